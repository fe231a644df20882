"""Tensors as bytes: dtypes as numpy arrays, and reading a region of a tensor in a file. No torch.

numpy has no bfloat16; its bits are kept as uint16. Only `convert_dtype` converts values.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator

import numpy as np

from qwen3_npu.errors import UsageError

Region = tuple[tuple[int, int], ...]  # (start, stop) per dimension
_BLOCK = 8 << 20  # bytes processed at a time, where a tensor need not be in memory as a whole


@dataclasses.dataclass(frozen=True)
class DType:
    """A floating point type under the names of the file formats.

    Attributes:
        torch: torch's name, e.g. "bfloat16".
        safetensors: code in a safetensors header.
        storage: class name in a torch checkpoint.
        carrier: numpy dtype that holds the bits.
    """

    torch: str
    safetensors: str
    storage: str
    carrier: np.dtype

    @property
    def itemsize(self) -> int:
        return self.carrier.itemsize

    def __reduce__(self) -> tuple:
        # dtypes are compared by identity; in another process it is that process's own.
        return _dtype_named, (self.torch,)


BF16 = DType("bfloat16", "BF16", "BFloat16Storage", np.dtype("<u2"))
F16 = DType("float16", "F16", "HalfStorage", np.dtype("<f2"))
F32 = DType("float32", "F32", "FloatStorage", np.dtype("<f4"))
DTYPES = (BF16, F16, F32)
U8 = DType("uint8", "U8", "ByteStorage", np.dtype("u1"))  # states of random generators, never weights
_BY_NAME = {d.torch: d for d in (*DTYPES, U8)}
BY_SAFETENSORS = {d.safetensors: d for d in DTYPES}
BY_STORAGE = {d.storage: d for d in (*DTYPES, U8)}
BY_TORCH = {d.torch: d for d in DTYPES} | {"bf16": BF16, "fp16": F16, "fp32": F32}


def _dtype_named(torch: str) -> DType:
    return _BY_NAME[torch]


def to_float32(array: np.ndarray, dtype: DType) -> np.ndarray:
    """The values as float32; exact for every dtype of `DTYPES`."""
    if dtype is BF16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def from_float32(values: np.ndarray, dtype: DType) -> np.ndarray:
    """float32 values rounded to nearest even, as torch rounds them."""
    if dtype is not BF16:
        return values.astype(dtype.carrier)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    # Adding could carry a NaN into infinity; torch writes the quiet NaN 0x7FC0.
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def convert_dtype(array: np.ndarray, source: DType, target: DType) -> np.ndarray:
    """The tensor in another dtype; the same array if it is the same dtype."""
    return array if source is target else from_float32(to_float32(array, source), target)


def widest(dtypes: Iterable[DType]) -> DType:
    """The smallest dtype that holds every value of all given dtypes exactly: float32 for bfloat16 and float16."""
    found = set(dtypes)
    return next(iter(found)) if len(found) == 1 else F32


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of one dtype and shape are equal bit for bit (so a NaN equals itself, 0 is not -0)."""
    bits = np.dtype(f"u{a.itemsize}")
    return np.array_equal(np.ascontiguousarray(a).view(bits), np.ascontiguousarray(b).view(bits))


def intersect(a: Region, b: Region) -> Region | None:
    """The intersection of two regions of one tensor, or None."""
    common = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def relative(region: Region, origin: Region) -> Region:
    """A region relative to the start of `origin`."""
    return tuple((start - o, stop - o) for (start, stop), (o, _) in zip(region, origin, strict=True))


def full(shape: tuple[int, ...]) -> Region:
    """The region that is the whole tensor."""
    return tuple((0, n) for n in shape)


def as_index(region: Region) -> tuple[slice, ...]:
    """A region as a numpy or torch index."""
    return tuple(slice(start, stop) for start, stop in region)


def sizes(region: Region) -> tuple[int, ...]:
    """The shape of a region."""
    return tuple(stop - start for start, stop in region)


def row_blocks(region: Region, itemsize: int) -> Iterator[Region]:
    """A region divided into blocks of complete rows (along the first dimension) of a few MB each."""
    (start, stop), *rest = region
    rows = max(1, _BLOCK // (itemsize * math.prod(b - a for a, b in rest)))
    for row in range(start, stop, rows):
        yield ((row, min(row + rows, stop)), *rest)


def _read_into(fd: int, offset: int, out: np.ndarray, path: str) -> None:
    """Fill a contiguous array from a file."""
    view = memoryview(out.data).cast("B") if out.size else memoryview(b"")
    done = 0
    while done < len(view):
        n = os.preadv(fd, [view[done:]], offset + done)
        if n == 0:
            raise UsageError(f"{path} ends early: byte {offset + done} was expected; the file is truncated")
        done += n


def read_region(fd: int, offset: int, shape: tuple[int, ...], dtype: DType, *, region: Region, path: str) -> np.ndarray:
    """A part of a contiguous tensor that starts at byte `offset` of an open file.

    Beside the result at most a few MB of memory are used: where only some columns are wanted, rows are read in blocks.

    Raises:
        UsageError: the file is shorter than it should be (`path` names it).
    """
    out = np.empty(sizes(region), dtype.carrier)
    _fill(fd, offset, shape, region, out=out, path=path)
    return out


def _fill(fd: int, offset: int, shape: tuple[int, ...], region: Region, *, out: np.ndarray, path: str) -> None:
    row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * out.itemsize
    start, stop = region[0] if region else (0, 1)
    if region[1:] == full(shape[1:]):
        _read_into(fd, offset + start * row_bytes, out, path)
    elif len(shape) == 2:
        rows = max(1, _BLOCK // row_bytes)
        columns = slice(*region[1])
        for row in range(start, stop, rows):
            block = np.empty((min(rows, stop - row), shape[1]), out.dtype)
            _read_into(fd, offset + row * row_bytes, block, path)
            out[row - start : row - start + len(block)] = block[:, columns]
    else:
        for index in range(start, stop):
            _fill(fd, offset + index * row_bytes, shape[1:], region[1:], out=out[index - start], path=path)
