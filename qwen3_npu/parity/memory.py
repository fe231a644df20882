"""How much memory activations take: bytes of the tensors that some code allocates, counted when they are made and
freed.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Activations(TorchDispatchMode):
    """Counts storages made by torch's operations, so neither earlier tensors nor those inside an operation.

    Attributes:
        kept: the maximum of bytes that autograd kept for backward.
        peak: the maximum of allocated bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}
        self._kept: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in given:
                self._made(storage)
        self.peak = max(self.peak, self._bytes(self._alive))
        return out

    def _made(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata

        def gone(_: weakref.ref) -> None:
            del self._alive[key]
            self._kept.discard(key)

        self._alive.setdefault(key, weakref.ref(storage, gone))

    def _bytes(self, keys: Iterable[int]) -> int:
        """As they are now: recomputing empties storages and fills them again."""
        return sum(storage.nbytes() for key in keys if (storage := self._alive[key]()) is not None)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """To be called with what autograd saves."""
        key = tensor.untyped_storage()._cdata
        if key in self._alive and key not in self._kept:
            self._kept.add(key)
            self.kept = max(self.kept, self._bytes(self._kept))
        return tensor


def _storages(values: object) -> Iterator[torch.UntypedStorage]:
    return (value.untyped_storage() for value in tree_iter(values) if isinstance(value, torch.Tensor))


@contextlib.contextmanager
def activations() -> Iterator[Activations]:
    """Count while the block runs."""
    counted = Activations()
    with counted, torch.autograd.graph.saved_tensors_hooks(counted.keep, lambda tensor: tensor):
        yield counted
