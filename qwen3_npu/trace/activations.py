"""Memory of activations: bytes of the tensors that some code creates, counted until they are freed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch._ops import OpOverload

from qwen3_npu.trace.storages import StorageWatch


class Activations(StorageWatch):
    """Counts bytes.

    Attributes:
        kept: largest number of bytes that autograd kept for backward.
        peak: largest number of bytes that were allocated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept = self.peak = 0
        self._kept: set[int] = set()

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        self.results((args, kwargs), out)
        self.peak = max(self.peak, self._bytes(self._alive))
        return out

    def freed(self, key: int) -> None:
        """See `StorageWatch`."""
        self._kept.discard(key)

    def _bytes(self, keys: Iterable[int]) -> int:
        """The present bytes; recomputation empties storages and fills them again."""
        # Iterate over a copy of the keys: a storage that is freed meanwhile is removed.
        known = [self._alive[key] for key in tuple(keys) if key in self._alive]
        return sum(storage.nbytes() for one in known if (storage := one()) is not None)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Call it with each tensor that autograd saves."""
        key = tensor.untyped_storage()._cdata
        if key in self._alive and key not in self._kept:
            self._kept.add(key)
            self.kept = max(self.kept, self._bytes(self._kept))
        return tensor


@contextlib.contextmanager
def activations() -> Iterator[Activations]:
    """Count while the block runs."""
    counted = Activations()
    with counted, torch.autograd.graph.saved_tensors_hooks(counted.keep, lambda tensor: tensor):
        yield counted
