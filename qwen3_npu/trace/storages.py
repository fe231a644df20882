"""Which storages torch's operations make, and when they are freed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qwen3_npu import host_memory


class StorageWatch(TorchDispatchMode):
    """Knows the storages that were made while it is on and are not freed yet.

    Earlier tensors are not among them, nor those that live inside an operation only, nor memory of the host that stands
    in for the device's. A subclass calls `results`
    after each operation, and may learn of a storage's end by `freed`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def results(self, given: object, out: object) -> list[torch.UntypedStorage]:
        """The storages of `out`, an operation's results, that are new: neither `given` to it nor known."""
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
        """A storage has ended; `key` was its `_cdata`."""


def storages_of(values: object) -> Iterator[torch.UntypedStorage]:
    """Of all tensors in a nest of containers."""
    return (value.untyped_storage() for value in tree_iter(values) if isinstance(value, torch.Tensor))
