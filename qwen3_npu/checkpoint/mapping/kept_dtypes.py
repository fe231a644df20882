"""Which tensors of a model have another dtype than most: float32 norms beside bfloat16 weights. No torch, no files."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable, Mapping

from qwen3_npu.checkpoint.binary.dtypes import DType, widest
from qwen3_npu.errors import UsageError

Shapes = Mapping[str, tuple[int, ...]]


def kept_dtypes(shapes: Shapes, dtype_of: Callable[[str], DType]) -> tuple[DType, DType, dict[str, DType]]:
    """The dtype of most weights, that of most LoRA tensors, and those of the tensors that have another.

    Args:
        shapes: of every Hugging Face and PEFT tensor.
        dtype_of: what each is stored in; a tensor for which it raises a `UsageError` is not looked at, since whoever
            reads it will say what is wrong.
    """
    found: dict[str, DType] = {}
    missing: UsageError | None = None
    for name in shapes:
        try:
            found[name] = dtype_of(name)
        except UsageError as error:
            missing = error
    numbers: dict[bool, collections.Counter[DType]] = {False: collections.Counter(), True: collections.Counter()}
    for name, dtype in found.items():
        numbers[_is_lora(name)][dtype] += math.prod(shapes[name])
    if missing is not None and not found:
        raise missing
    weights, lora = (numbers[kind] or numbers[not kind] for kind in (False, True))
    most = {False: weights.most_common(1)[0][0], True: lora.most_common(1)[0][0]}
    kept = {name: dtype for name, dtype in found.items() if dtype is not most[_is_lora(name)]}
    return most[False], most[True], kept


def same_in_all_layers(
    dtype: DType, lora_dtype: DType, kept: Mapping[str, DType], shapes: Shapes
) -> tuple[DType, DType, dict[str, DType]]:
    """The same for torch_dist, which stores a tensor of all layers (and experts) as one: these have one dtype.

    Of gate and up, which are one tensor too, it stores the chunks apart.
    """
    groups: dict[str, list[str]] = {}
    for name in shapes if kept else ():
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", name).replace(".up_proj.", ".gate_proj."), []).append(name)
    wide: dict[str, DType] = {}
    for names in groups.values():
        usual = lora_dtype if _is_lora(names[0]) else dtype
        if (found := widest(kept.get(name, usual) for name in names)) is not usual:
            wide |= dict.fromkeys(names, found)
    return dtype, lora_dtype, wide


def _is_lora(name: str) -> bool:
    return name.startswith("base_model.")
