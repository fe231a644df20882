"""Read the .idx file of Megatron's indexed datasets (MMIDIDX version 1) strictly. No torch.

    b"MMIDIDX\\0\\0", uint64 version, uint8 dtype code, uint64 sequences S, uint64 document boundaries D,
    int32 lengths[S], int64 byte offsets[S], int64 boundaries[D] (0 and, for each document, the sequence after it)

Sequences may lie in the .bin file in any order, as Megatron allows, but they must cover it: each byte belongs to one
sequence. So a damaged index, or the index of another .bin, is detected.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

from qwen3_npu import schema
from qwen3_npu.errors import UsageError
from qwen3_npu.once import once_a_node

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = len(MAGIC) + 8 + 1 + 8 + 8
TOKEN_DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
CHUNK = 1 << 20  # sequences handled at once
_AGAIN = "preprocess the data again"


@dataclasses.dataclass(frozen=True)
class TokenIndex:
    """A checked index.

    Attributes:
        dtype: of the tokens.
        lengths: int32 [sequences], tokens of each.
        offsets: int64 [sequences], the byte of the .bin file at which each begins.
        boundaries: int64 [documents + 1], 0 and, for each document, the sequence after it.
        in_order: the sequences lie one after the other in the .bin file.
    """

    dtype: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray
    boundaries: np.ndarray
    in_order: bool


def index_slices(count: int) -> Iterator[slice]:
    """Slices of `CHUNK` sequences up to `count`."""
    for start in range(0, count, CHUNK):
        yield slice(start, min(start + CHUNK, count))


def read_index(path: Path, bin_bytes: int) -> TokenIndex:
    """Read an index and check it against the size of its .bin file. One process of a node checks; the others map it.

    Raises:
        UsageError: it is no index, is damaged, or belongs to another .bin file.
    """

    def check(path: Path) -> str:
        return _checked(path, bin_bytes)

    said = once_a_node(f"index of {bin_bytes} bytes", path, check)
    code, sequences, boundaries, in_order = map(int, said.split())
    return TokenIndex(np.dtype(TOKEN_DTYPES[code]), *_arrays(path, sequences, boundaries), in_order=bool(in_order))


def _arrays(path: Path, sequences: int, boundaries: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths, offsets and boundaries, memory-mapped."""
    with open(schema.open_regular(path), "rb") as file:
        return (
            np.memmap(file, np.int32, "r", HEADER_BYTES, (sequences,)),
            np.memmap(file, np.int64, "r", HEADER_BYTES + 4 * sequences, (sequences,)),
            np.memmap(file, np.int64, "r", HEADER_BYTES + 12 * sequences, (boundaries,)),
        )


def _checked(path: Path, bin_bytes: int) -> str:
    """The code of the dtype, the numbers of sequences and boundaries, and whether they are in order (1 or 0).

    Raises:
        UsageError: see `read_index`.
    """
    with open(schema.open_regular(path), "rb") as file:
        size, header = os.fstat(file.fileno()).st_size, file.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
        raise UsageError(f"{path} is not a Megatron index file (or is truncated); {_AGAIN}")
    version, sequences, boundaries = (int.from_bytes(header[a : a + 8], "little") for a in (9, 18, 26))
    code = header[17]
    if version != 1:
        raise UsageError(f"{path} is an index of version {version}; only version 1 is known; {_AGAIN}")
    if code not in TOKEN_DTYPES:
        raise UsageError(f"{path} is damaged: {code} is no code of a type of numbers; {_AGAIN}")
    dtype = np.dtype(TOKEN_DTYPES[code])
    if dtype.kind == "f":
        raise UsageError(f"{path} says that its tokens are {dtype}; token ids are integers; {_AGAIN}")
    expected = HEADER_BYTES + 12 * sequences + 8 * boundaries
    if size == expected + sequences and sequences:
        raise UsageError(f"{path} is a multimodal index (it has modes of sequences), which cannot be trained on")
    if size != expected:
        raise UsageError(f"{path} is truncated or damaged: {size} bytes, {expected} expected; {_AGAIN}")
    if sequences == 0:
        raise UsageError(f"{path} holds no documents")
    if boundaries == 0:
        raise UsageError(f"{path} is damaged: it has no boundaries of documents; {_AGAIN}")
    lengths, offsets, ends = _arrays(path, sequences, boundaries)
    in_order = _check_lengths(path, lengths, offsets, dtype.itemsize, bin_bytes=bin_bytes)
    if not in_order:
        _check_tiling(path, lengths, offsets, dtype.itemsize, bin_bytes=bin_bytes)
    _check_boundaries(path, ends, sequences)
    return f"{code} {sequences} {boundaries} {int(in_order)}"


def _damaged(path: Path, why: str) -> NoReturn:
    raise UsageError(f"{path} is damaged: {why}; {_AGAIN}")


def _check_lengths(path: Path, lengths: np.ndarray, offsets: np.ndarray, itemsize: int, *, bin_bytes: int) -> bool:
    """Check that the sequences together are as long as the .bin file. Returns whether they lie in order."""
    position, in_order = 0, True
    for chunk in index_slices(len(lengths)):
        sizes = lengths[chunk].astype(np.int64) * itemsize
        if sizes.min() < 0:
            _damaged(path, f"sequence {chunk.start + int(sizes.argmin())} has {sizes.min() // itemsize} tokens")
        after = position + np.cumsum(sizes)
        in_order = in_order and bool(np.array_equal(offsets[chunk], after - sizes))
        position = int(after[-1])
        if position > bin_bytes:
            position += int(lengths[chunk.stop :].sum(dtype=np.int64)) * itemsize
            break
    bin_ = path.with_suffix(".bin")
    if position > bin_bytes:
        raise UsageError(f"{bin_} is truncated: {bin_bytes} bytes, {position} expected; preprocess it again")
    if position < bin_bytes:
        raise UsageError(
            f"{bin_} does not belong to {path.name}: it has {bin_bytes} bytes, the index describes {position}; {_AGAIN}"
        )
    if position == 0:
        raise UsageError(f"{path} holds no tokens")
    return in_order


def _check_tiling(path: Path, lengths: np.ndarray, offsets: np.ndarray, itemsize: int, *, bin_bytes: int) -> None:
    """Check that sequences in any order cover the file without gap or overlap."""
    outside = (offsets < 0) | (offsets > bin_bytes)
    if outside.any():
        number = int(outside.argmax())
        _damaged(path, f"sequence {number} begins at byte {offsets[number]} of {bin_bytes}")
    filled = np.flatnonzero(lengths)
    order = filled[np.argsort(offsets[filled], kind="stable")]
    starts = offsets[order]
    ends = starts + lengths[order].astype(np.int64) * itemsize
    expected = np.concatenate(([0], ends[:-1]))
    if not np.array_equal(starts, expected):
        place = int(np.flatnonzero(starts != expected)[0])
        what = "overlaps another one" if starts[place] < expected[place] else "leaves a hole before it"
        _damaged(path, f"sequence {order[place]}, which begins at byte {starts[place]}, {what}")


def _check_boundaries(path: Path, ends: np.ndarray, sequences: int) -> None:
    if ends[0] != 0 or ends[-1] != sequences:
        _damaged(path, f"its documents go from sequence {ends[0]} to {ends[-1]}, not from 0 to {sequences}")
    for chunk in index_slices(len(ends)):
        part = ends[chunk.start : chunk.stop + 1]
        if (part[1:] < part[:-1]).any():
            _damaged(path, f"its documents are not in ascending order (from document {chunk.start} on)")
