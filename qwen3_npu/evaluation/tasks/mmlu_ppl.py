"""MMLU with MindSpeed-LLM's text for `mmlu_ppl` (two spaces after "about").

The answer there is the letter with the lowest cross-entropy of prompt and letter together. The prompt's part and the
number of tokens are equal for all four letters, so it is the letter with the highest likelihood.
"""

from __future__ import annotations

import dataclasses

from qwen3_npu.evaluation.task import Texts
from qwen3_npu.evaluation.tasks import mmlu

TASK = dataclasses.replace(
    mmlu.TASK,
    name="mmlu_ppl",
    texts={
        "en": Texts("The following are multiple choice questions (with answers) about  {subject}.\n\n", mmlu.QUESTION)
    },
)
