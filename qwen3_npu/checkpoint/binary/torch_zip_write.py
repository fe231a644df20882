"""Write `torch.save`'s zip format tensor by tensor, without torch and without the whole model in memory.

The pickle with names, shapes and dtypes is written first. The storages follow, each aligned to 64 bytes as in torch.
`torch.load(path, weights_only=True)` reads the result, with or without `mmap=True`.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import DType
from qwen3_npu.files import Seal, SealedFile

_ALIGNMENT = 64
_ZIP64_EXTRA = 20  # bytes that zipfile adds to a local header it opens with force_zip64


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to be written later."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def stride(self) -> tuple[int, ...]:
        return tuple(int(np.prod(self.shape[i + 1 :], dtype=np.int64)) for i in range(len(self.shape)))


@dataclasses.dataclass(frozen=True)
class TorchName:
    """A name inside torch, written into the pickle without importing torch."""

    module: str
    name: str

    def __call__(self) -> None:  # pickle wants the function of a reduction to be callable
        raise AssertionError("only written, never called")


@dataclasses.dataclass(frozen=True)
class _StorageId:
    key: str
    tensor: Tensor


# The pure-python pickler is the one whose handling of single types can be extended; it exists since pickle does.
class TorchPickler(pickle._Pickler):
    """Writes `Tensor`s, `DType`s and `TorchName`s as torch pickles tensors, dtypes and names."""

    # These three are pickle._Pickler's; its published types leave them out.
    write: Callable[[bytes], object]
    memoize: Callable[[object], None]
    save_reduce: Callable[[object, tuple[object, ...]], None]

    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, protocol=2)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: object) -> object:
        if isinstance(obj, _StorageId):
            storage = TorchName("torch", obj.tensor.dtype.storage)
            return ("storage", storage, obj.key, "cpu", obj.tensor.numel)
        return None

    def save_torch_name(self, obj: TorchName) -> None:
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        self.memoize(obj)

    def save_tensor(self, obj: Tensor) -> None:
        storage = _StorageId(str(len(self.tensors)), obj)
        self.tensors.append(obj)
        arguments: tuple[object, ...] = (storage, 0, obj.shape, obj.stride, False, collections.OrderedDict())
        self.save_reduce(TorchName("torch._utils", "_rebuild_tensor_v2"), arguments)

    def save_dtype(self, obj: DType) -> None:
        self.save_torch_name(TorchName("torch", obj.torch))

    dispatch[TorchName] = save_torch_name
    dispatch[Tensor] = save_tensor
    dispatch[DType] = save_dtype


class _FromHere:
    """A file whose position 0 is the present position of another file."""

    def __init__(self, file: SealedFile) -> None:
        self.file, self.start = file, file.tell()

    def write(self, data: bytes | memoryview, /) -> int:
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        """Do nothing: the larger file stays open."""

    def tell(self) -> int:
        return self.file.tell() - self.start


class PtWriter:
    """One checkpoint file being written.

    `content` is plain data with `Tensor`s in it (and `DType`s, written as torch dtypes). `write` must then be called
    with every tensor's data, in the order in which the tensors appear in `content`.
    """

    def __init__(self, path: Path, content: object) -> None:
        self.file = SealedFile(path)
        self._begin(_FromHere(self.file), content, path.stem)

    def _begin(self, file: _FromHere, content: object, root: str) -> None:
        buffer = io.BytesIO()
        pickler = TorchPickler(buffer)
        pickler.dump(content)
        self.tensors: Iterator[tuple[int, Tensor]] = enumerate(pickler.tensors)
        self.archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)
        self.target, self.root = file, root
        self._entry("data.pkl", buffer.getvalue())
        self._entry("byteorder", b"little")

    def write(self, array: np.ndarray) -> None:
        """Write the next tensor's data; dtype and number of elements must be the announced ones."""
        key, tensor = next(self.tensors)
        if array.size != tensor.numel or array.dtype != tensor.dtype.carrier:
            raise AssertionError(f"tensor {key}: {array.shape} {array.dtype} written, {tensor} announced")
        self._entry(f"data/{key}", np.ascontiguousarray(array).data.cast("B") if array.size else b"")

    def _entry(self, name: str, data: bytes | memoryview) -> None:
        """Write one entry with the checksum in its header; zipfile would seek back to insert it."""
        info = zipfile.ZipInfo(f"{self.root}/{name}")  # the fixed date makes equal content equal bytes
        info.external_attr = 0o600 << 16
        info.header_offset = self.target.tell()
        start = info.header_offset + 30 + len(info.filename) + _ZIP64_EXTRA + 4
        padding = -start % _ALIGNMENT
        info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        info.CRC, info.file_size, info.compress_size = zlib.crc32(data), len(data), len(data)
        try:
            self.target.write(info.FileHeader(zip64=True))
            self.target.write(data)
        except OSError:
            self.archive.fp = None  # or it would try to finish the archive, on the full disk, when it is collected
            raise
        self.archive.filelist.append(info)
        self.archive.start_dir = self.target.tell()
        self.archive._didModify = True  # type: ignore[attr-defined]

    def _end(self) -> None:
        if (left := next(self.tensors, None)) is not None:
            raise AssertionError(f"tensor {left[0]} was not written")
        self._entry("version", b"3\n")
        self.archive.close()

    def close(self) -> Seal | None:
        """Finish the archive and flush it to disk."""
        self._end()
        return self.file.close()


class PtSection(PtWriter):
    """A complete archive inside a larger file, from its present position on; `close` leaves the file open."""

    def __init__(self, file: SealedFile, content: object) -> None:
        self._begin(_FromHere(file), content, "archive")

    def close(self) -> None:
        """Finish the archive."""
        self._end()
