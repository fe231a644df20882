"""Check and write Megatron's indexed datasets (`<prefix>.bin` + `<prefix>.idx`, MMIDIDX version 1). No torch.

The .bin file holds tokens, the .idx file (`token_index.py`) divides them into sequences. Files of this project have a
record beside them (`token_record.py`). Their tokens are int32 as in MindSpeed-LLM (labels hold -100), and one document
is one sequence.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from qwen3_npu import schema
from qwen3_npu.data.train.token_index import MAGIC, TOKEN_DTYPES, TokenIndex, index_slices, read_index
from qwen3_npu.data.train.token_record import IdRange, TokenRecord, record_path
from qwen3_npu.errors import UsageError
from qwen3_npu.files import flush, rename
from qwen3_npu.once import once_a_node

_READ = 16 << 20  # bytes of an index digested at once


@dataclasses.dataclass(frozen=True)
class Indexed:
    """A checked pair of files.

    Attributes:
        index: the sequences.
        tokens: all tokens in the order of the .bin file, which may differ from that of the sequences; memory-mapped.
    """

    prefix: str
    index: TokenIndex
    tokens: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """int32 [sequences], tokens of each."""
        return self.index.lengths

    def __len__(self) -> int:
        return len(self.index.lengths)

    def __getitem__(self, number: int) -> np.ndarray:
        """The tokens of a sequence."""
        start = int(self.index.offsets[number]) // self.index.dtype.itemsize
        return self.tokens[start : start + int(self.index.lengths[number])]

    def fingerprint(self) -> str:
        """A digest of the index, for the names of caches made from it."""
        return once_a_node("sha256", Path(self.prefix + ".idx"), _sha256)[:16]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(_READ):
            digest.update(part)
    return digest.hexdigest()


def open_indexed(prefix: str | Path, flag: str = "--data-path") -> Indexed:
    """Open a pair and check that the files are complete and agree with each other.

    Raises:
        UsageError: a file is missing, truncated, or not what its name says.
    """
    prefix = str(prefix)
    idx, bin_ = Path(prefix + ".idx"), Path(prefix + ".bin")
    if missing := [str(p) for p in (idx, bin_) if not p.exists()]:
        raise UsageError(
            f"{flag} {prefix}: {' and '.join(missing)} not found; give the prefix that "
            f"preprocess_data.py printed, without .bin"
        )
    stats = [os.stat(path) for path in (idx, bin_)]
    return _opened(prefix, tuple((stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in stats))


@functools.lru_cache(maxsize=64)  # each holds a descriptor of its .bin
def _opened(prefix: str, stats: tuple[tuple[int, int, int], ...]) -> Indexed:
    """The pair in its present state; cached, since a training opens each pair several times."""
    bin_ = Path(prefix + ".bin")
    with open(schema.open_regular(bin_), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        index = read_index(Path(prefix + ".idx"), size)
        return Indexed(prefix, index, np.memmap(file, index.dtype, "r", 0, (size // index.dtype.itemsize,)))


class IndexedWriter:
    """Writes a pair of files. Nothing is visible under the final names until `publish`.

    Tokens go to <prefix>.bin.tmp and lengths to <prefix>.len.tmp, so memory does not grow with the data.
    """

    def __init__(
        self, prefix: str | Path, resume: tuple[int, int] | None = None, made: Mapping[str, object] | None = None
    ) -> None:
        """Start a pair, or resume one at a `position` that an earlier run reached.

        Args:
            made: settings for the record (`TokenRecord.made`).

        Raises:
            OSError: the files of the earlier run are missing, or shorter than its position.
        """
        self.prefix = str(prefix)
        self.files = [self._open(name, size) for name, size in zip(self._temporary(), resume or (0, 0), strict=True)]
        self.made, self.ids = made or {}, IdRange()
        if resume and resume[0]:
            earlier = np.memmap(self._temporary()[0], np.int32, "r")
            for part in index_slices(len(earlier)):
                self.ids += IdRange.of(earlier[part])

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
        tokens = np.asarray(tokens, np.int32)
        self.ids += IdRange.of(tokens)
        for file, array in zip(self.files, (tokens, lengths), strict=True):
            file.write(np.ascontiguousarray(array, dtype=np.int32).data)

    def position(self) -> tuple[int, int]:
        """Sizes of both temporary files in bytes, after they are flushed to disk."""
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
            write_token_index(file, lengths)
            flush(file)

    def _close(self) -> None:
        for file in self.files:
            file.close()

    def abort(self) -> None:
        """Delete the temporary files."""
        self._close()
        for name in self._temporary():
            Path(name).unlink(missing_ok=True)


def publish(writers: Sequence[IndexedWriter]) -> None:
    """Make finished pairs visible under their names. They replace older pairs.

    The old .idx files are deleted first and the new ones are moved last, so an .idx never lies beside a .bin of another
    run.
    """
    for writer in writers:
        writer._finish()
    for writer in writers:
        for path in (Path(writer.prefix + ".idx"), record_path(writer.prefix)):
            path.unlink(missing_ok=True)
    for extension in (".bin", ".idx"):
        for writer in writers:
            rename(writer.prefix + extension + ".tmp", writer.prefix + extension)
    for writer in writers:
        TokenRecord(writer.ids, writer.made).write(record_path(writer.prefix), writer.prefix)
        os.unlink(writer._temporary()[1])


def write_token_index(
    file: BinaryIO, lengths: np.ndarray, boundaries: np.ndarray | None = None, dtype: npt.DTypeLike = np.int32
) -> None:
    """Write the .idx file of sequences with these lengths, in chunks.

    Args:
        boundaries: of documents; None: one document per sequence.
    """
    count, size = len(lengths), np.dtype(dtype).itemsize
    code = next(code for code, known in TOKEN_DTYPES.items() if np.dtype(known) == dtype)
    ends = count + 1 if boundaries is None else len(boundaries)
    file.write(MAGIC + (1).to_bytes(8, "little") + bytes([code]))
    file.write(count.to_bytes(8, "little") + ends.to_bytes(8, "little"))
    for chunk in index_slices(count):
        file.write(lengths[chunk].astype(np.int32).tobytes())
    offset = 0
    for chunk in index_slices(count):
        after = offset + np.cumsum(lengths[chunk], dtype=np.int64) * size
        file.write(np.concatenate(([offset], after[:-1])).astype(np.int64).tobytes())
        offset = int(after[-1])
    for chunk in index_slices(ends):
        numbers = np.arange(chunk.start, chunk.stop, dtype=np.int64)
        file.write(numbers.tobytes() if boundaries is None else boundaries[chunk].astype(np.int64).tobytes())
