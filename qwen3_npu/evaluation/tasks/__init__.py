"""The benchmarks, one small file each."""

from __future__ import annotations

from qwen3_npu.evaluation.task import Task
from qwen3_npu.evaluation.tasks import boolq, ceval, cmmlu, gsm8k, mmlu, mmlu_ppl

TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in (mmlu, cmmlu, ceval, gsm8k, boolq, mmlu_ppl)}
