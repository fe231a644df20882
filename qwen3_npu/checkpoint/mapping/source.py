"""What every conversion reads from: something that answers for regions of Hugging Face tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import (
    F32,
    DType,
    Region,
    as_index,
    from_float32,
    full,
    relative,
    row_blocks,
    to_float32,
)
from qwen3_npu.checkpoint.mapping.lora import Contents
from qwen3_npu.checkpoint.mapping.table import Shard
from qwen3_npu.errors import UsageError, printable
from qwen3_npu.model.arch import Qwen3Arch


class Source(Protocol):
    """Tensors under their Hugging Face names (an adapter's: under PEFT's), wherever they lie."""

    arch: Qwen3Arch
    contents: Contents

    def dtype(self, name: str) -> DType: ...

    def read(self, name: str, region: Region) -> np.ndarray: ...

    def close(self) -> None: ...


def read_tensor(source: Source, name: str, shape: tuple[int, ...], dtype: DType) -> np.ndarray:
    """One whole Hugging Face tensor in `dtype`."""
    out = np.empty(shape, dtype.carrier)
    stored = source.dtype(name)
    for block in row_blocks(full(shape), dtype.itemsize):
        out[as_index(block)] = _converted(source.read(name, block), stored, dtype, name)
    return out


def _converted(data: np.ndarray, stored: DType, dtype: DType, name: str) -> np.ndarray:
    """Values in another dtype. Raises: UsageError: a finite one is too large for it."""
    if stored is dtype:
        return data
    values = to_float32(data, stored)
    found = from_float32(values, dtype)
    if dtype is not F32 and (np.isinf(to_float32(found, dtype)) & np.isfinite(values)).any():
        largest = np.abs(values[np.isfinite(values)]).max()
        raise UsageError(
            f"{printable(name)} has a value of {largest:.4g}, which {dtype.torch} cannot hold; choose another "
            f"--params-dtype, or leave it out to keep each tensor's own"
        )
    return found


def read_shard(source: Source, shard: Shard, dtype: DType) -> np.ndarray:
    """One Megatron tensor, put together from its slices and converted to `dtype`. Shape: `shard.shape`.

    Beyond the result a few MB are in memory: slices pass through in blocks.

    Raises:
        UsageError: a finite value is too large for `dtype`.
    """
    out = np.empty(shard.view, dtype.carrier)
    for piece in shard.slices:
        stored = source.dtype(piece.hf)
        for block in row_blocks(piece.source, dtype.itemsize):
            data = _converted(source.read(piece.hf, block), stored, dtype, piece.hf)
            out[as_index(piece.part(block))] = data.T if piece.transposed else data
    return out.reshape(shard.shape)


def view_of(out: np.ndarray, part: Region, whole: Region) -> np.ndarray:
    """The view of `out` (which holds region `whole` of a tensor) that holds region `part`."""
    return out[as_index(relative(part, whole))]


def listed(names: Iterable[str], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return printable(", ".join(ordered[:limit])) + more


def check_tensors(
    found: Mapping[str, tuple[int, ...] | None], wanted: Mapping[str, tuple[int, ...]], where: str, what: str
) -> None:
    """Every tensor is there, of its shape, and no other.

    Args:
        found: name -> shape; None for something that is no tensor.
        where, what: name the file and what decides which tensors belong in it, for messages.

    Raises:
        UsageError: tensors are missing, extra or of another shape.
    """
    if missing := wanted.keys() - found.keys():
        raise UsageError(f"{where}: tensors missing for {what}: {listed(missing)}")
    if extra := found.keys() - wanted.keys():
        raise UsageError(f"{where}: tensors not expected for {what}: {listed(extra)}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise UsageError(f"{where}: {name} has shape {found[name]}; {shape} expected for {what}")
