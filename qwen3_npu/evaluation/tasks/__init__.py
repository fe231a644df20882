"""The benchmarks: one small file for each name of `args.evaluation.EVALUATION_TASKS`, which is the list of them."""

from __future__ import annotations

import importlib

from qwen3_npu.args.evaluation import CUSTOM, EVALUATION_TASKS
from qwen3_npu.evaluation.task import Task

TASKS: dict[str, Task] = {
    name: importlib.import_module(f"{__name__}.{name}").TASK for name in EVALUATION_TASKS if name != CUSTOM
}
