"""GSM8K (arXiv:2110.14168): worked answers, of which the number counts; as in lm-evaluation-harness (version 3)."""

from __future__ import annotations

from qwen3_npu.evaluation.task import GENERATE, Task, Texts

TASK = Task(
    name="gsm8k",
    version="3",
    subjects={"gsm8k": ("gsm8k", {"en": "gsm8k"})},
    texts={"en": Texts("", "Question: {question}\nAnswer:")},
    test=("test.jsonl", "gsm8k_test.jsonl", "test_*.jsonl"),
    examples=("train.jsonl", "gsm8k_train.jsonl"),
    method=GENERATE,
    choices=(),
    shots=5,
    drawn=1234,
    stop=("Question:", "</s>", "<|im_end|>"),
    limit=256,
    filters={
        "strict-match": (r"#### (\-?[0-9\.\,]+)", 0),
        "flexible-extract": (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
    },
)
