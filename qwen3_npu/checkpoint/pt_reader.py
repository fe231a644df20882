"""torch checkpoints (`torch.save`'s zip format) read without torch, lazily, and without running what is in them.

A .pt file is a zip archive of `data.pkl` (a pickle whose tensors refer to storages by key) and `data/<key>` (raw
storages, stored uncompressed). Reading the pickle gives `TensorRef`s; their bytes are read by regions on demand.

Security: names in the pickle are never imported. A short list has a meaning here; names of frameworks that training
arguments mention (enums, dtypes) become inert `Unknown` objects; anything else is refused.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
import os
import pickle
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_npu.checkpoint.cuts import Region
from qwen3_npu.checkpoint.tensors import BY_STORAGE, BY_TORCH, DType, read_region
from qwen3_npu.errors import UsageError


@dataclasses.dataclass(frozen=True)
class TensorRef:
    """A tensor of an open checkpoint; its bytes are still on disk."""

    storage: str
    dtype: DType | None
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # elements


class Unknown:
    """Stands for an object of a class that is not imported; remembers its name, does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: DType | None


def _rebuild_tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> TensorRef:
    return TensorRef(storage.key, storage.dtype, tuple(size), tuple(stride), offset)


_MEANINGS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("argparse", "Namespace"): argparse.Namespace,
    ("types", "SimpleNamespace"): types.SimpleNamespace,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch", "Size"): tuple,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "slice"): slice,
    ("builtins", "complex"): complex,
    ("_codecs", "encode"): lambda text, encoding: str(text).encode("latin1"),
}
_INERT_MODULES = ("torch", "numpy", "megatron", "mindspeed", "mindspeed_llm", "pathlib", "datetime", "enum")


class _Unpickler(pickle.Unpickler):
    """Builds plain data and `TensorRef`s; imports nothing."""

    def __init__(self, file: io.BytesIO, path: Path) -> None:
        super().__init__(file, encoding="latin1")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _MEANINGS:
            return _MEANINGS[module, name]
        if module == "torch" and name in BY_TORCH:
            return BY_TORCH[name]
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return BY_STORAGE.get(name, name)
        if module.split(".")[0] in _INERT_MODULES:
            return type(name, (Unknown,), {"__module__": module})
        raise UsageError(
            f"{self.path} refers to {module}.{name}, which no checkpoint of weights needs; the file is refused, "
            f"since loading it could run code"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, *_rest = pid
        return _Storage(str(key), kind if isinstance(kind, DType) else None)


class PtFile:
    """One open checkpoint file. `content` is what `torch.load` would give, with `TensorRef`s for tensors."""

    def __init__(self, path: str | Path) -> None:
        """Raises: UsageError: missing, truncated, not a torch zip file, or something in it is not plain data."""
        self.path = Path(path)
        try:
            self.fd = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UsageError(f"{path} cannot be opened: {error.strerror}") from None
        try:
            with open(self.fd, "rb", closefd=False) as file, zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                pickled = next(e for e in entries if e.filename.endswith("/data.pkl"))
                root = pickled.filename[: -len("data.pkl")]
                self._offsets = {
                    e.filename[len(root) + len("data/") :]: self._data_offset(e)
                    for e in entries
                    if e.filename.startswith(root + "data/") and e.compress_type == zipfile.ZIP_STORED
                }
                self.content: Any = _Unpickler(io.BytesIO(archive.read(pickled)), self.path).load()
        except (zipfile.BadZipFile, StopIteration):
            self.close()
            raise UsageError(
                f"{path} is not a whole torch checkpoint: truncated, or not written by torch.save (zip format)"
            ) from None
        except (pickle.UnpicklingError, EOFError, TypeError, ValueError, IndexError, KeyError) as error:
            self.close()
            raise error if isinstance(error, UsageError) else UsageError(f"{path} cannot be read: {error}") from None

    def _data_offset(self, entry: zipfile.ZipInfo) -> int:
        # The local header repeats name and extra field, with an extra field of its own length (alignment padding).
        header = os.pread(self.fd, 30, entry.header_offset)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile
        return (
            entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        )

    def read(self, tensor: TensorRef, view: tuple[int, ...], region: Region) -> np.ndarray:
        """A part of a tensor.

        Args:
            view: the shape in which `region` is meant; as many elements as the tensor.
        """
        if tensor.dtype is None:
            raise UsageError(f"{self.path} holds a weight whose dtype is not float32, float16 or bfloat16")
        if not _is_contiguous(tensor):
            raise UsageError(f"{self.path} holds a weight that is not contiguous; save it with .contiguous()")
        start = self._offsets[tensor.storage] + tensor.offset * tensor.dtype.itemsize
        return read_region(self.fd, start, view, tensor.dtype, region, str(self.path))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _is_contiguous(tensor: TensorRef) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
