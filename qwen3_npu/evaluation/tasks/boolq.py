"""BoolQ (arXiv:1905.10044), yes or no about a passage; texts as in lm-evaluation-harness (super_glue)."""

from __future__ import annotations

from qwen3_npu.evaluation.task import Task, Texts

TASK = Task(
    name="boolq",
    version="2",
    subjects={"boolq": ("boolq", {"en": "boolq"})},
    texts={"en": Texts("", "{passage}\nQuestion: {question}?\nAnswer:")},
    rename={"label": "answer"},
    test=("dev.jsonl", "val.jsonl", "validation.jsonl", "boolq.jsonl"),
    examples=("train.jsonl",),
    choices=("no", "yes"),
    answers={"False": "no", "True": "yes", "0": "no", "1": "yes"},
    shots=0,
    drawn=1234,
    spare=True,
)
