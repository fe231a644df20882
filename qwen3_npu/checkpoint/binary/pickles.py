"""Pickles read without running what is in them.

Names in the pickle are never imported. A short list has a meaning here; names of frameworks that training arguments
mention (enums, dtypes) become inert `Unknown` objects; anything else is refused.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
import pickle
import types
from pathlib import Path
from typing import Any

from qwen3_npu.checkpoint.binary.dtypes import BY_STORAGE, BY_TORCH, DType
from qwen3_npu.errors import UsageError


@dataclasses.dataclass(frozen=True)
class TensorRef:
    """A tensor of an open checkpoint; its bytes are still on disk."""

    storage: str
    dtype: DType | None
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # elements

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


class Unknown:
    """Stands for an object of a class that is not imported; remembers its arguments and state, does nothing."""

    args: tuple = ()
    state: Any = None

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


def _size(sizes: Any = ()) -> tuple:
    return tuple(sizes)


def _member(owner: Any, name: str) -> Unknown:
    """How Python 3.11 pickles a member of an enum. Nothing is looked up."""
    return Unknown(owner, name)


_MEANINGS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("argparse", "Namespace"): argparse.Namespace,
    ("types", "SimpleNamespace"): types.SimpleNamespace,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch", "Size"): _size,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "slice"): slice,
    ("builtins", "complex"): complex,
    ("builtins", "getattr"): _member,
    ("_codecs", "encode"): lambda text, encoding: str(text).encode("latin1"),
}
_INERT_MODULES = ("torch", "numpy", "megatron", "mindspeed", "mindspeed_llm", "pathlib", "datetime", "enum", "signal")


class _Unpickler(pickle.Unpickler):
    """Builds plain data and `TensorRef`s; imports nothing."""

    def __init__(self, file: io.BytesIO, path: Path) -> None:
        super().__init__(file, encoding="latin1")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # as protocol 2 calls it, which torch uses
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


def read_pickle(data: bytes, path: Path) -> Any:
    """What the pickle describes, as plain data, `TensorRef`s and `Unknown`s.

    Raises:
        UsageError: it is damaged, or something in it is not plain data (`path` names the file).
    """
    try:
        return _Unpickler(io.BytesIO(data), path).load()
    except UsageError:
        raise
    except (pickle.UnpicklingError, EOFError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
