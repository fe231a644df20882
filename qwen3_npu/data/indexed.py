"""Megatron's indexed datasets (`<prefix>.bin` + `<prefix>.idx`, MMIDIDX version 1): checked and written. No torch.

    .bin  tokens, one after the other
    .idx  b"MMIDIDX\\0\\0", uint64 version, uint8 dtype code, uint64 sequences S, uint64 document borders D,
          int32 lengths[S], int64 byte offsets[S], int64 borders[D] (0 and, for each document, the sequence after it)

Tokens are int32, as MindSpeed-LLM writes them (labels hold -100). One document is one sequence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np

from qwen3_npu.errors import UsageError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER_BYTES = len(_MAGIC) + 8 + 1 + 8 + 8
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
INT32 = 4


@dataclasses.dataclass(frozen=True)
class Indexed:
    """A checked pair of files.

    Attributes:
        lengths: int32 [sequences], tokens of each.
        tokens: all tokens, memory-mapped.
    """

    prefix: str
    lengths: np.ndarray
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def fingerprint(self) -> str:
        """Changes when the index does: names caches made from it."""
        return hashlib.sha256(Path(self.prefix + ".idx").read_bytes()).hexdigest()[:16]


def open_indexed(prefix: str | Path) -> Indexed:
    """Open a pair and check that the files are whole and agree with each other.

    Raises:
        UsageError: a file is missing, truncated, or not what its name says.
    """
    prefix = str(prefix)
    idx, bin_ = Path(prefix + ".idx"), Path(prefix + ".bin")
    if missing := [str(p) for p in (idx, bin_) if not p.is_file()]:
        raise UsageError(
            f"--data-path {prefix}: {' and '.join(missing)} not found; give the prefix that "
            f"preprocess_data.py printed, without .bin"
        )
    size = idx.stat().st_size
    header = idx.open("rb").read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        raise UsageError(f"{idx} is not a Megatron index file (or is truncated); preprocess the data again")
    code = header[17]
    sequences, borders = (int.from_bytes(header[a : a + 8], "little") for a in (18, 26))
    expected = _HEADER_BYTES + 12 * sequences + 8 * borders
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
    return Indexed(prefix, lengths, np.memmap(bin_, dtype, "r", 0, (needed // dtype.itemsize,)))


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
    """Writes a pair of files. Nothing is visible under the final names until `close`; the .idx appears last."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.file = open(self.prefix + ".bin.tmp", "wb")
        self.lengths: list[np.ndarray] = []

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            tokens: int32, the documents one after the other.
            lengths: int32, tokens of each document.
        """
        self.file.write(memoryview(np.ascontiguousarray(tokens, dtype=np.int32)))
        self.lengths.append(np.asarray(lengths, dtype=np.int32))

    def close(self) -> None:
        """Finish both files: flushed, renamed, index last."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        lengths = np.concatenate(self.lengths) if self.lengths else np.zeros(0, np.int32)
        with open(self.prefix + ".idx.tmp", "wb") as file:
            file.write(index_bytes(lengths))
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.prefix + ".bin.tmp", self.prefix + ".bin")
        os.replace(self.prefix + ".idx.tmp", self.prefix + ".idx")

    def abort(self) -> None:
        """Drop what was written."""
        self.file.close()
        Path(self.prefix + ".bin.tmp").unlink(missing_ok=True)


def index_bytes(lengths: np.ndarray) -> bytes:
    """The .idx file of int32 documents with these lengths, one sequence each."""
    count = len(lengths)
    offsets = np.zeros(count, np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
    header = _MAGIC + (1).to_bytes(8, "little") + bytes([INT32])
    header += count.to_bytes(8, "little") + (count + 1).to_bytes(8, "little")
    borders = np.arange(count + 1, dtype=np.int64)
    return header + lengths.astype(np.int32).tobytes() + (offsets * 4).tobytes() + borders.tobytes()
