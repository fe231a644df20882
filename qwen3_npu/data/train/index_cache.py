"""Cache indices that take long to compute as .npy files with a seal: sizes, digests and the identity of the data. No
torch.

The seal is written last, when the files are on the disk. Files that do not match their seal (zeroed by a crash,
truncated, of other data) are made anew, and the log says so. On each node one process checks the files and the others
use its result, so no process trains on files that another one has found to be wrong.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Literal

import numpy as np

from qwen3_npu import log, schema
from qwen3_npu.errors import UsageError
from qwen3_npu.files import replacing, sync_folder, write_text
from qwen3_npu.lease import Lease
from qwen3_npu.once import once_a_node, shared_record

_READ = 16 << 20


class IndexCache:
    """The arrays of one index.

    Args:
        folder: folder of the files; created with them.
        stem: prefix of the file names; unique for each index.
        parts: names of the arrays.
    """

    def __init__(self, folder: Path, stem: str, parts: Sequence[str]) -> None:
        self.folder, self.stem = folder, stem
        self.paths = [folder / f"{stem}-{part}.npy" for part in parts]
        self.seal = folder / f"{stem}-seal.json"

    def arrays(self, make: Callable[[], Sequence[np.ndarray]]) -> list[np.ndarray]:
        """The memory-mapped arrays. If they are missing or wrong, one process makes them first and the others wait.

        Raises:
            UsageError: they cannot be written.
        """
        if (why := self._fault()) is not None:
            what, remedy = f"index caches in {self.folder}", "give --data-cache-path DIR"
            with Lease(self.folder / f"{self.stem}.lease", what, remedy, wait=True):
                why = self._fault()  # another process may have been faster
                if why:
                    log.warning(f"{why}; it is made again")
                if why is not None:
                    try:
                        self._write(make())
                    except OSError as error:
                        place = error.filename2 or error.filename or self.folder
                        raise UsageError(f"{what} cannot be written: {place}: {error.strerror}; {remedy}") from None
        return [_mapped(path) for path in self.paths]

    def _write(self, arrays: Sequence[np.ndarray]) -> None:
        self.seal.unlink(missing_ok=True)
        files = {}
        for path, array in zip(self.paths, arrays, strict=True):
            with replacing(path, binary=True) as file:
                written = _Written(file)
                np.save(written, array)
            files[path.name] = [written.size, written.digest]
        sync_folder(self.folder)
        write_text(self.seal, json.dumps({"version": 1, "index": self.stem, "crc32": files}))
        sync_folder(self.folder)

    def _fault(self) -> str | None:
        """The fault of the files; "" if they are missing or not finished."""
        if not self.seal.is_file():
            return ""
        try:
            seal = shared_record(self.seal)
            if seal.text("index") != self.stem:
                return f"{self.seal} is of another index"
            files = seal.record("crc32").fields
        except UsageError as error:
            return str(error)
        for path in self.paths:
            if not path.is_file():
                return f"{path} is missing"
            if files.get(path.name) != [path.stat().st_size, int(once_a_node("crc32", path, _digest))]:
                return f"{path} is damaged: it is not what {self.seal.name} says"
        return None


class _Written:
    """A file that computes size and CRC-32 of its data while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.digest = file, 0, 0

    def write(self, data: bytes) -> int:
        self.size, self.digest = self.size + len(data), zlib.crc32(data, self.digest)
        return self.file.write(data)


def _mapped(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped; one process of a node reads the header."""
    header = schema.record(json.loads(once_a_node("npy", path, _header)), str(path))
    order: Literal["C", "F"] = "F" if header.boolean("by_columns") else "C"
    return np.memmap(path, header.text("dtype"), "r", header.integer("offset"), header.counts("shape"), order)


def _header(path: Path) -> str:
    """dtype, shape, order and first byte of the numbers of a .npy file, as JSON."""
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(file)
        return json.dumps(
            {"dtype": dtype.str, "shape": list(shape), "by_columns": bool(by_columns), "offset": file.tell()}
        )


def _digest(path: Path) -> str:
    """CRC-32 of a file as text. It detects damage, not manipulation, and is faster than reading from disk."""
    digest = 0
    with open(path, "rb") as file:
        while part := file.read(_READ):
            digest = zlib.crc32(part, digest)
    return str(digest)
