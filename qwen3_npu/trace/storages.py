"""Follow the storages that torch's operations allocate and free."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qwen3_npu import host_memory


class StorageWatch(TorchDispatchMode):
    """Knows the storages that were allocated while it is on and are not freed yet.

    Not included: earlier tensors, temporary ones inside an operation, and host memory used in place of device memory.
    A subclass calls `results` after each operation, and may override `freed`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def results(self, given: object, out: object) -> list[torch.UntypedStorage]:
        """The new storages among an operation's results `out`: neither `given` to it nor known."""
        if host_memory.is_being_made:
            return []
        known = {storage._cdata for storage in storages_of(given)} | self._alive.keys()
        new = {storage._cdata: storage for storage in storages_of(out) if storage._cdata not in known}
        for storage in new.values():
            self._watch(storage)
        return list(new.values())

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata

        def gone(_: weakref.ref[torch.UntypedStorage]) -> None:
            del self._alive[key]
            self.freed(key)

        self._alive[key] = weakref.ref(storage, gone)

    def freed(self, key: int) -> None:
        """A storage was freed; `key` was its `_cdata`."""


def storages_of(values: object) -> Iterator[torch.UntypedStorage]:
    """The storages of all tensors in nested containers."""
    return (value.untyped_storage() for value in tree_iter(values) if isinstance(value, torch.Tensor))
