"""torch checkpoints (`torch.save`'s zip format) read without torch and lazily.

A .pt file is a zip archive of `data.pkl` (a pickle whose tensors refer to storages by key) and `data/<key>` (raw
storages, stored uncompressed). Reading the pickle gives `TensorRef`s; their bytes are read by regions on demand.
Nothing in the file is run (`pickles.py`).
"""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import Region, read_region
from qwen3_npu.checkpoint.binary.pickles import TensorRef, read_pickle
from qwen3_npu.errors import UsageError


class _Window(io.RawIOBase):
    """A part of an open file, as a file."""

    def __init__(self, fd: int, start: int, length: int) -> None:
        self.fd, self.start, self.length, self.position = fd, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self.length - self.position))
        data = os.pread(self.fd, wanted, self.start + self.position)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


class PtArchive:
    """A torch archive that is a part of an open file. `content` is what `torch.load` would give, with `TensorRef`s."""

    def __init__(self, fd: int, start: int, length: int, path: Path) -> None:
        """Raises: UsageError: truncated, not a torch zip archive, or something in it is not plain data."""
        self.fd, self.start, self.path = fd, start, path
        try:
            with zipfile.ZipFile(io.BufferedReader(_Window(fd, start, length))) as archive:
                entries = archive.infolist()
                pickled = next(e for e in entries if e.filename.endswith("/data.pkl"))
                root = pickled.filename[: -len("data.pkl")]
                self._offsets = {
                    e.filename[len(root) + len("data/") :]: self._data_offset(e)
                    for e in entries
                    if e.filename.startswith(root + "data/") and e.compress_type == zipfile.ZIP_STORED
                }
                data = archive.read(pickled)
        except (zipfile.BadZipFile, StopIteration, EOFError, ValueError, NotImplementedError):
            # zipfile raises NotImplementedError for a compression that it lacks: a flipped bit may name one.
            raise UsageError(
                f"{path} is not a whole torch checkpoint: truncated, or not written by torch.save (zip format)"
            ) from None
        self.content: Any = read_pickle(data, path)

    def _data_offset(self, entry: zipfile.ZipInfo) -> int:
        # The local header repeats name and extra field, with an extra field of its own length (alignment padding).
        start = self.start + entry.header_offset
        header = os.pread(self.fd, 30, start)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile
        return start + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")

    def read(self, tensor: TensorRef, view: tuple[int, ...], region: Region) -> np.ndarray:
        """A part of a tensor.

        Args:
            view: the shape in which `region` is meant; as many elements as the tensor.
        """
        if tensor.dtype is None:
            raise UsageError(f"{self.path} holds a weight whose dtype is not float32, float16 or bfloat16")
        if not tensor.is_contiguous:
            raise UsageError(f"{self.path} holds a weight that is not contiguous; save it with .contiguous()")
        if tensor.storage not in self._offsets:
            raise UsageError(f"{self.path} lacks the data of a tensor; it is not a whole torch checkpoint")
        start = self._offsets[tensor.storage] + tensor.offset * tensor.dtype.itemsize
        return read_region(self.fd, start, view, tensor.dtype, region, str(self.path))


class PtFile(PtArchive):
    """One open checkpoint file."""

    def __init__(self, path: str | Path) -> None:
        """Raises: UsageError: missing, or see `PtArchive`."""
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UsageError(f"{path} cannot be opened: {error.strerror}") from None
        try:
            super().__init__(fd, 0, os.fstat(fd).st_size, Path(path))
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
