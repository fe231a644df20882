"""What CANN computes on a 910B's own CPU (AICPU) instead of its cores, or not at all. Inside of a step it is refused.

The lists are those of CANN's published operator sources for 910B: `*_DTYPE_SUPPORT_LIST` in `op_api/*.cpp` of
ops-math (cumsum, topk, sort, masked_fill, histogram, bincount, search_sorted, right_shift, arithmetic, comparisons and
reductions) and ops-nn (scatter_elements_v2, gather_elements, gather_v2, index, masked_scatter, non_zero), as of
August 2026. What is not listed here was not looked at.
"""

from __future__ import annotations

import collections
from typing import Any

import torch

_FLOATS = {torch.float32, torch.float16, torch.bfloat16}
_SMALL = {torch.int32, torch.int8, torch.uint8}
_INTEGERS = _SMALL | {torch.int16, torch.int64}
# Operation, without its overload and "_" -> dtypes of its first tensor that the cores compute.
_CORES: dict[str, set[torch.dtype]] = {
    "cumsum": _FLOATS | {torch.int32},
    "topk": _FLOATS,
    "sort": _FLOATS,
    "argsort": _FLOATS,
    "masked_fill": _FLOATS | {torch.bool, torch.int8, torch.int32},
    "masked_scatter": _FLOATS | _INTEGERS,
    "scatter": _FLOATS | _SMALL,
    "scatter_add": _FLOATS | _SMALL,
    "gather": _FLOATS | _INTEGERS,
    "nonzero": _FLOATS | {torch.bool, torch.int8, torch.uint8},
    "index": _FLOATS | _SMALL | {torch.int64, torch.bool},
    "index_select": _FLOATS | _INTEGERS | {torch.bool},
    "sum": _FLOATS | {torch.int32, torch.int64},
    "neg": _FLOATS | {torch.int8, torch.int32, torch.int64},
    "abs": _FLOATS | {torch.int32, torch.int64},
    "sign": _FLOATS | {torch.int32},
    "clamp": _FLOATS | {torch.int32, torch.int64},
    "floor_divide": _FLOATS | _SMALL | {torch.int64},
    "bincount": set(),
    "_unique2": set(),
    "unique_dim": set(),
}
for _names, _dtypes in (
    ("add sub mul eq ne lt", _FLOATS | _SMALL | {torch.int64, torch.bool}),
    ("gt ge le amax amin max min", _FLOATS | _SMALL | {torch.int64}),
    ("maximum minimum", _FLOATS | {torch.int8, torch.int32, torch.int64}),
    ("bitwise_and bitwise_or bitwise_xor", {torch.int16, torch.int32, torch.int64, torch.bool}),
    ("searchsorted bucketize __rshift__ __lshift__ bitwise_right_shift bitwise_left_shift", set()),
):
    _CORES.update(dict.fromkeys(_names.split(), _dtypes))
# Phases of `qwen3_npu.watch.here` that make a step.
_STEP = ("forward", "backward", "reduce", "optimizer")
FOUND: collections.Counter[str] = collections.Counter()
_phase = ["other"]


def why(name: str, args: Any, kwargs: dict[str, Any]) -> str | None:
    """Why an operation does not run on the cores; None if it does."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.device.type == "npu"]
    short = name.partition(".")[0]
    short = short if short.endswith("__") else short.removesuffix("_")
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return f"{short} of float64"
    if short not in _CORES or not tensors or not tensors[0].numel():
        return None
    dtype = tensors[0].dtype
    if short in ("cumsum", "sum"):  # computed in the dtype of the result
        dtype = kwargs.get("dtype") or (dtype if dtype.is_floating_point else torch.int64)
    return None if dtype in _CORES[short] else f"{short} of {str(dtype).removeprefix('torch.')}"


def check(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """Raises: RuntimeError: the device's own CPU would compute this inside of a step."""
    if _phase[0] in _STEP and (reason := why(name, args, kwargs)) is not None:
        FOUND[reason] += 1
        raise RuntimeError(f"{reason} runs on a 910B's own CPU, not on its cores")


def install() -> None:
    """Follow the phases of steps."""
    from qwen3_npu.watch import here

    at = here.at

    def followed(phase: str) -> None:
        _phase[0] = phase
        at(phase)

    here.at = followed
