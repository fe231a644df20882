"""Read pickles of checkpoints as plain data: nothing in them is imported or called.

A short list of names has a meaning here (torch's tensors and dtypes, plain containers of the standard library). Names
of frameworks that training arguments mention become inert `Unknown` objects. Anything else is refused.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen3_npu.checkpoint.binary.dtypes import BY_STORAGE, BY_TORCH, DType
from qwen3_npu.checkpoint.binary.pickle_machine import Machine, Name, NotPlain, Unknown, plain_set
from qwen3_npu.errors import UsageError, printable

__all__ = ["Storage", "TensorRef", "Unknown", "read_pickle"]


@dataclasses.dataclass(frozen=True)
class Storage:
    """A storage by the pickle; its dtype is None if weights cannot have it (its elements have another size then)."""

    key: str
    dtype: DType | None
    numel: int


@dataclasses.dataclass(frozen=True)
class TensorRef:
    """A tensor of an open checkpoint; its bytes are still on disk. It lies inside its storage."""

    storage: str
    dtype: DType | None
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # elements

    @property
    def is_contiguous(self) -> bool:
        if 0 in self.shape:
            return True
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


def _counts(value: object) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise NotPlain("a tensor's size or stride is no list")
    if not all(type(n) is int and 0 <= n < 2**63 for n in value):
        raise NotPlain("a tensor's size or stride is no list of counts")
    return tuple(int(n) for n in value)


def _tensor(storage: object, offset: object, size: object, stride: object, *_: object) -> TensorRef:
    shape, strides = _counts(size), _counts(stride)
    if type(storage) is not Storage or type(offset) is not int or offset < 0 or len(shape) != len(strides):
        raise NotPlain("a tensor without a storage, an offset or a stride per dimension")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if offset > storage.numel or (0 not in shape and last >= storage.numel):
        raise NotPlain(
            f"a tensor of shape {list(shape)} at {offset} lies outside its storage of {storage.numel} elements"
        )
    return TensorRef(storage.key, storage.dtype, shape, strides, offset=offset)


def _parameter(data: object, *_: object) -> Any:
    return data


def _typed(build: object, kind: object, args: object, state: object) -> Any:
    """A tensor with additional attributes, which are dropped."""
    if build != _REBUILD or type(args) is not tuple:
        raise NotPlain("a tensor of an unknown kind")
    return _tensor(*args)


def _dict(*args: object) -> dict:
    """An OrderedDict; old pickles give it a list of pairs."""
    if not args:
        return {}
    pairs: Any = args[0] if len(args) == 1 and isinstance(args[0], (list, tuple)) else [None]
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise NotPlain("an OrderedDict of something that is no pairs")
    plain_set([key for key, _ in pairs])
    return {key: value for key, value in pairs}


def _default_dict(factory: object = None, *args: object) -> dict:
    """A defaultdict as a dict: the factory makes missing keys only, and a file has only existing ones."""
    if factory is not None and type(factory) is not Unknown:
        raise NotPlain("a defaultdict whose factory is no name")
    return _dict(*args)


def _list(items: Any = (), maxlen: Any = None) -> list:
    if type(items) not in (list, tuple):
        raise NotPlain("a deque of something that is no list")
    return list(items)


def _encoded(text: object, encoding: object) -> bytes:
    """Bytes, in the form that protocol 2 gives them."""
    if type(text) is not str or encoding != "latin1":
        raise NotPlain("bytes in another encoding than latin1")
    return text.encode("latin1")


def _size(sizes: object = ()) -> tuple[int, ...]:
    return _counts(sizes)


def _complex(real: Any = 0.0, imaginary: Any = 0.0) -> complex:
    if not all(type(part) in (int, float) for part in (real, imaginary)):
        raise NotPlain("a complex number of something that is no numbers")
    return complex(real, imaginary)


_REBUILD = Unknown(Name("torch._utils", "_rebuild_tensor_v2"), ())
_MEANINGS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _dict,
    ("collections", "defaultdict"): _default_dict,
    ("collections", "deque"): _list,
    ("argparse", "Namespace"): argparse.Namespace,
    ("types", "SimpleNamespace"): argparse.Namespace,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _typed,
    ("torch", "Size"): _size,
    ("builtins", "set"): lambda items=(): plain_set(items),
    ("builtins", "frozenset"): lambda items=(): frozenset(plain_set(items)),
    ("builtins", "slice"): slice,
    ("builtins", "complex"): _complex,
    ("builtins", "bytearray"): lambda data=b"": bytearray(data if isinstance(data, bytes) else b""),
    ("builtins", "bytes"): lambda data=b"": data if isinstance(data, bytes) else b"",  # protocol 2 calls it for none
    ("_codecs", "encode"): _encoded,
}
# Calls that are remembered as they are: nothing is looked up. (Python 3.11 pickles a member of an enum by getattr.)
_INERT_MODULES: tuple[str, ...] = ("torch", "torch_npu", "numpy", "megatron", "mindspeed", "mindspeed_llm")
_INERT_MODULES += ("transformer_engine", "pathlib", "datetime", "enum", "signal")
_INERT = {("builtins", "getattr"), ("_io", "BytesIO"), ("io", "BytesIO")}
_FACTORIES = {("builtins", name) for name in ("dict", "list", "set", "int", "float", "str", "bool", "tuple")}


class _Reader:
    """Gives meaning to the names of one pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.storages: dict[str, Storage] = {}

    def known(self, name: Name) -> tuple[str, str]:
        module = "builtins" if name.module == "__builtin__" else name.module  # as protocol 2 calls it
        key = (module, name.name)
        if key in _MEANINGS or key in _INERT or key in _FACTORIES or module.split(".")[0] in _INERT_MODULES:
            return key
        raise UsageError(
            f"{self.path} refers to {printable(str(name))[:200]}, which no checkpoint of weights needs; the file is "
            f"refused, since loading it could run code"
        )

    def value(self, name: Name) -> Any:
        """The value of a name: dtypes and storage classes of torch become dtypes."""
        key = self.known(name)
        if name.module == "torch" and name.name in BY_TORCH:
            return BY_TORCH[name.name]
        if name.module in ("torch", "torch.storage") and name.name in BY_STORAGE:
            return BY_STORAGE[name.name]
        return _REBUILD if key == ("torch._utils", "_rebuild_tensor_v2") else Unknown(name, ())

    def build(self, name: Name, args: tuple) -> Any:
        key = self.known(name)
        return _MEANINGS[key](*args) if key in _MEANINGS else Unknown(name, args)

    def persistent(self, pid: object) -> Storage:
        if type(pid) is not tuple or len(pid) < 5 or pid[0] != "storage":
            raise NotPlain("a persistent id that is no storage")
        _, kind, key, _, numel = pid[:5]
        if type(key) is not str or type(numel) is not int or not 0 <= numel < 2**63:
            raise NotPlain("a storage without a key and a number of elements")
        storage = Storage(key, kind if isinstance(kind, DType) else None, numel)
        if self.storages.setdefault(key, storage) != storage:
            raise NotPlain(f"storage {printable(key)[:40]} has two sizes or types")
        return storage


def read_pickle(data: bytes, path: Path) -> tuple[Any, dict[str, Storage]]:
    """The content of a pickle as plain data, `TensorRef`s and `Unknown`s; and the storages of its tensors.

    Raises:
        UsageError: it is damaged, or something in it is not plain data (`path` names the file).
    """
    reader = _Reader(path)
    try:
        return Machine(data, reader.build, reader.value, reader.persistent).run(), reader.storages
    except NotPlain as error:
        raise UsageError(f"{path} cannot be read: {printable(str(error))}") from None
