"""The families of models: `model_type` of config.json -> a row of facts. A new family is one file and one row here."""

from __future__ import annotations

from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch.families.family import Family
from qwen3_npu.model.arch.families.qwen2 import QWEN2
from qwen3_npu.model.arch.families.qwen3 import QWEN3, QWEN3_MOE
from qwen3_npu.schema import shown

FAMILIES: dict[str, Family] = {family.model_type: family for family in (QWEN3, QWEN3_MOE, QWEN2)}


def find_family(model_type: object, where: str) -> Family:
    """Raises: UsageError: no family of that name; `where` says it."""
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    *most, last = map(repr, FAMILIES)
    raise UsageError(f"{where}: model_type is {shown(model_type)}; only {', '.join(most)} and {last} are supported")
