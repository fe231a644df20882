"""Megatron's indexed datasets (`<prefix>.bin` + `<prefix>.idx`, MMIDIDX version 1): checked and written. No torch.

    .bin  tokens, one after the other
    .idx  b"MMIDIDX\\0\\0", uint64 version, uint8 dtype code, uint64 sequences S, uint64 document boundaries D,
          int32 lengths[S], int64 byte offsets[S], int64 boundaries[D] (0 and, for each document, the sequence after it)

Tokens are int32, as MindSpeed-LLM writes them (labels hold -100). One document is one sequence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from qwen3_npu.errors import UsageError
from qwen3_npu.files import flush, rename

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER_BYTES = len(_MAGIC) + 8 + 1 + 8 + 8
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
_PIECE = 1 << 20  # documents of an index handled at once


@dataclasses.dataclass(frozen=True)
class Indexed:
    """A checked pair of files.

    Attributes:
        lengths: int32 [sequences], tokens of each.
        tokens: all tokens, memory-mapped.
        boundaries: int64 [documents + 1], 0 and, for each document, the sequence after it.
    """

    prefix: str
    lengths: np.ndarray
    tokens: np.ndarray
    boundaries: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def fingerprint(self) -> str:
        """Changes when the index does: names caches made from it."""
        return hashlib.sha256(Path(self.prefix + ".idx").read_bytes()).hexdigest()[:16]


def open_indexed(prefix: str | Path, flag: str = "--data-path") -> Indexed:
    """Open a pair and check that the files are whole and agree with each other.

    Raises:
        UsageError: a file is missing, truncated, or not what its name says.
    """
    prefix = str(prefix)
    idx, bin_ = Path(prefix + ".idx"), Path(prefix + ".bin")
    if missing := [str(p) for p in (idx, bin_) if not p.is_file()]:
        raise UsageError(
            f"{flag} {prefix}: {' and '.join(missing)} not found; give the prefix that "
            f"preprocess_data.py printed, without .bin"
        )
    size = idx.stat().st_size
    header = idx.open("rb").read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        raise UsageError(f"{idx} is not a Megatron index file (or is truncated); preprocess the data again")
    code = header[17]
    sequences, boundaries = (int.from_bytes(header[a : a + 8], "little") for a in (18, 26))
    expected = _HEADER_BYTES + 12 * sequences + 8 * boundaries
    if size != expected or code not in _DTYPES:
        raise UsageError(f"{idx} is truncated or damaged: {size} bytes, {expected} expected; preprocess the data again")
    if sequences == 0:
        raise UsageError(f"{idx} holds no documents")
    lengths = np.memmap(idx, np.int32, "r", _HEADER_BYTES, (sequences,))
    offsets = np.memmap(idx, np.int64, "r", _HEADER_BYTES + 4 * sequences, (sequences,))
    dtype = np.dtype(_DTYPES[code])
    needed = int(offsets[-1]) + int(lengths[-1]) * dtype.itemsize
    if bin_.stat().st_size < needed:
        raise UsageError(f"{bin_} is truncated: {bin_.stat().st_size} bytes, {needed} expected; preprocess it again")
    ends = np.memmap(idx, np.int64, "r", _HEADER_BYTES + 12 * sequences, (boundaries,))
    return Indexed(prefix, lengths, np.memmap(bin_, dtype, "r", 0, (needed // dtype.itemsize,)), ends)


def check_vocabulary(data: Indexed, vocab_size: int, sample: int = 1 << 20) -> None:
    """Look at the first and last `sample` tokens.

    Raises:
        UsageError: a token that the model does not have.
    """
    largest = max(int(part.max()) for part in (data.tokens[:sample], data.tokens[-sample:]))
    if largest >= vocab_size:
        raise UsageError(
            f"--data-path {data.prefix} holds token {largest}, but the model's vocabulary has {vocab_size} rows: "
            f"it was made with another tokenizer"
        )


class IndexedWriter:
    """Writes a pair of files. Nothing is visible under the final names until `publish`.

    Tokens go to <prefix>.bin.tmp and lengths to <prefix>.len.tmp, so memory does not grow with the data.
    """

    def __init__(self, prefix: str | Path, resume: tuple[int, int] | None = None) -> None:
        """Start a pair, or go on with one at a `position` that an earlier run reached.

        Raises:
            OSError: the files of the earlier run are not there, or shorter than `resume` says.
        """
        self.prefix = str(prefix)
        self.files = [self._open(name, size) for name, size in zip(self._temporary(), resume or (0, 0), strict=True)]

    def _temporary(self) -> tuple[str, str]:
        return self.prefix + ".bin.tmp", self.prefix + ".len.tmp"

    @staticmethod
    def _open(name: str, size: int) -> BinaryIO:
        if not size:
            return open(name, "wb")
        if os.path.getsize(name) < size:
            raise OSError(f"{name} is shorter than it was")
        os.truncate(name, size)
        return open(name, "ab")

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            tokens: int32, the documents one after the other.
            lengths: int32, tokens of each document.
        """
        for file, array in zip(self.files, (tokens, lengths), strict=True):
            file.write(np.ascontiguousarray(array, dtype=np.int32).data)

    def position(self) -> tuple[int, int]:
        """Bytes of both temporary files, all of them on disk when this returns."""
        for file in self.files:
            flush(file)
        return self.files[0].tell(), self.files[1].tell()

    def close(self) -> None:
        """Finish a single pair and make it visible."""
        publish([self])

    def _finish(self) -> None:
        self.position()
        self._close()
        name = self._temporary()[1]
        lengths = np.memmap(name, np.int32, "r") if os.path.getsize(name) else np.zeros(0, np.int32)
        with open(self.prefix + ".idx.tmp", "wb") as file:
            write_index(file, lengths)
            flush(file)

    def _close(self) -> None:
        for file in self.files:
            file.close()

    def abort(self) -> None:
        """Drop what was written."""
        self._close()
        for name in self._temporary():
            Path(name).unlink(missing_ok=True)


def publish(writers: Sequence[IndexedWriter]) -> None:
    """Make finished pairs visible under their names, replacing older ones.

    The old .idx files go first and the new ones come last: at no moment does an .idx lie beside a .bin of another run.
    """
    for writer in writers:
        writer._finish()
    for writer in writers:
        Path(writer.prefix + ".idx").unlink(missing_ok=True)
    for extension in (".bin", ".idx"):
        for writer in writers:
            rename(writer.prefix + extension + ".tmp", writer.prefix + extension)
    for writer in writers:
        os.unlink(writer._temporary()[1])


def write_index(
    file: BinaryIO, lengths: np.ndarray, boundaries: np.ndarray | None = None, dtype: npt.DTypeLike = np.int32
) -> None:
    """The .idx file of sequences with these lengths; written in pieces.

    Args:
        boundaries: of documents; None: one document per sequence.
    """
    count, size = len(lengths), np.dtype(dtype).itemsize
    code = next(code for code, known in _DTYPES.items() if np.dtype(known) == dtype)
    ends = count + 1 if boundaries is None else len(boundaries)
    file.write(_MAGIC + (1).to_bytes(8, "little") + bytes([code]))
    file.write(count.to_bytes(8, "little") + ends.to_bytes(8, "little"))
    pieces = [slice(start, start + _PIECE) for start in range(0, count, _PIECE)]
    for piece in pieces:
        file.write(lengths[piece].astype(np.int32).tobytes())
    offset = 0
    for piece in pieces:
        after = offset + np.cumsum(lengths[piece], dtype=np.int64) * size
        file.write(np.concatenate(([offset], after[:-1])).astype(np.int64).tobytes())
        offset = int(after[-1])
    for start in range(0, ends, _PIECE):
        stop = min(start + _PIECE, ends)
        file.write((np.arange(start, stop, dtype=np.int64) if boundaries is None else boundaries[start:stop]).tobytes())
