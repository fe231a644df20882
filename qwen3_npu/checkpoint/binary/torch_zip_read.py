"""Read torch checkpoints (`torch.save`'s zip format) lazily and without torch.

A .pt file is a zip archive of `data.pkl` (a pickle whose tensors refer to storages by key) and `data/<key>` (raw
storages, stored uncompressed). Reading the pickle gives `TensorRef`s; their bytes are read by regions on demand.
Nothing in the file is executed (`pickles.py`).
"""

from __future__ import annotations

import dataclasses
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import Region, read_region
from qwen3_npu.checkpoint.binary.pickles import Storage, TensorRef, read_pickle
from qwen3_npu.errors import UsageError, printable
from qwen3_npu.schema import open_regular

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BLOCK = 8 << 20  # bytes read at a time
_MOST_PICKLE = 512 << 20  # bytes of data.pkl; the largest models' are a few MB


class _FileSection(io.RawIOBase):
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

    def readinto(self, buffer: WriteableBuffer) -> int:
        into = memoryview(buffer).cast("B")
        wanted = max(0, min(len(into), self.length - self.position))
        data = os.pread(self.fd, wanted, self.start + self.position)
        into[: len(data)] = data
        self.position += len(data)
        return len(data)


@dataclasses.dataclass
class _ZipEntry:
    """The place of an entry's bytes in the open file.

    Attributes:
        crc: CRC-32 of the bytes; 0 if the writer left it out (`torch.serialization.set_crc32_options(False)`).
        checked: whether the bytes were compared with it.
    """

    start: int
    size: int
    crc: int
    checked: bool = False


class PtArchive:
    """A torch archive in an open file. `content` is what `torch.load` would return, with `TensorRef`s for tensors."""

    def __init__(self, fd: int, start: int, length: int, path: Path) -> None:
        """Raises: UsageError: it is truncated, no torch zip archive, or holds something that is not plain data."""
        self.fd, self.start, self.path = fd, start, path
        try:
            with zipfile.ZipFile(io.BufferedReader(_FileSection(fd, start, length))) as archive:
                entries = self._entries(archive)
        except (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError, OverflowError, struct.error):
            # zipfile raises NotImplementedError for a compression that it lacks: a flipped bit may set one.
            raise UsageError(
                f"{path} is not a complete torch checkpoint: truncated, or not written by torch.save (zip format)"
            ) from None
        root = self._root(entries)
        pickled = entries[root + "data.pkl"]
        if pickled.size > _MOST_PICKLE:
            raise UsageError(f"{path}: data.pkl has {pickled.size} bytes; at most {_MOST_PICKLE} are read")
        self._check_order(entries.get(root + "byteorder"))
        self._data = {n.removeprefix(root + "data/"): e for n, e in entries.items() if n.startswith(root + "data/")}
        self._check(pickled, "data.pkl")
        content, storages = read_pickle(self._bytes(pickled), path)
        self.content: Any = content
        for storage in storages.values():
            self._check_size(storage)

    def _entries(self, archive: zipfile.ZipFile) -> dict[str, _ZipEntry]:
        """Every entry by name. An entry is uncompressed and lies between its own header and the next one."""
        found: dict[str, _ZipEntry] = {}
        end = 0
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
            if not stored or info.flag_bits & 1 or info.header_offset < end or info.filename in found:
                raise zipfile.BadZipFile
            begin = self._data_offset(info)
            end = begin - self.start + info.file_size
            if end > archive.start_dir:
                raise zipfile.BadZipFile
            found[info.filename] = _ZipEntry(begin, info.file_size, info.CRC)
        return found

    def _data_offset(self, entry: zipfile.ZipInfo) -> int:
        # The local header repeats name and extra field, with an extra field of its own length (alignment padding).
        start = self.start + entry.header_offset
        header = os.pread(self.fd, 30 + len(entry.orig_filename.encode()), start)
        name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        if header[:4] != b"PK\x03\x04" or header[30:] != entry.orig_filename.encode() or name != len(header) - 30:
            raise zipfile.BadZipFile
        return start + 30 + name + extra

    def _root(self, entries: Mapping[str, _ZipEntry]) -> str:
        roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise UsageError(f"{self.path} has {len(roots)} data.pkl; it is no checkpoint written by torch.save")
        if roots[0] + "constants.pkl" in entries:
            raise UsageError(f"{self.path} is a TorchScript program; a checkpoint written by torch.save is expected")
        return roots[0]

    def _check_order(self, entry: _ZipEntry | None) -> None:
        if entry is not None and (order := os.pread(self.fd, min(entry.size, 16), entry.start)) != b"little":
            raise UsageError(f"{self.path} has byte order {order!r}; only b'little' is read")

    def _check_size(self, storage: Storage) -> None:
        entry = self._data.get(storage.key)
        if entry is None:
            raise UsageError(f"{self.path} lacks the data of a tensor; it is not a complete torch checkpoint")
        if storage.dtype is not None and entry.size != storage.numel * storage.dtype.itemsize:
            raise UsageError(
                f"{self.path}: data/{printable(storage.key)[:40]} has {entry.size} bytes, not {storage.numel} elements "
                f"of {storage.dtype.torch}; the file is damaged"
            )

    def _bytes(self, entry: _ZipEntry) -> bytes:
        data = bytearray()
        while len(data) < entry.size:
            part = os.pread(self.fd, min(entry.size - len(data), _BLOCK), entry.start + len(data))
            if not part:
                raise UsageError(f"{self.path} ends early; the file is truncated")
            data += part
        return bytes(data)

    def _check(self, entry: _ZipEntry, name: str) -> None:
        """Compare an entry with its CRC-32 before its first use; later reads then find it in the page cache."""
        if entry.checked or entry.crc == 0:
            return
        crc, done, block = 0, 0, bytearray(min(_BLOCK, entry.size))
        while done < entry.size:
            read = os.preadv(self.fd, [memoryview(block)[: entry.size - done]], entry.start + done)
            if read == 0:
                raise UsageError(f"{self.path} ends early; the file is truncated")
            crc = zlib.crc32(memoryview(block)[:read], crc)
            done += read
        if crc != entry.crc:
            raise UsageError(f"{self.path} is damaged: the CRC-32 of {name} is another")
        entry.checked = True

    def read(self, tensor: TensorRef, view: tuple[int, ...], region: Region) -> np.ndarray:
        """A part of a tensor.

        Args:
            view: the shape to which `region` refers; it has as many elements as the tensor.
        """
        if tensor.dtype is None:
            raise UsageError(f"{self.path} holds a weight whose dtype is not float32, float16 or bfloat16")
        if not tensor.is_contiguous:
            raise UsageError(f"{self.path} holds a weight that is not contiguous; save it with .contiguous()")
        entry = self._data[tensor.storage]
        self._check(entry, f"data/{tensor.storage}")
        start = entry.start + tensor.offset * tensor.dtype.itemsize
        return read_region(self.fd, start, view, tensor.dtype, region=region, path=str(self.path))


class PtFile(PtArchive):
    """One open checkpoint file."""

    def __init__(self, path: str | Path) -> None:
        """Raises: UsageError: it is missing, or see `PtArchive`."""
        fd = open_regular(path)
        try:
            super().__init__(fd, 0, os.fstat(fd).st_size, Path(path))
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
