"""Hugging Face tensors read by regions out of the Megatron tensors that hold their slices, in whatever files."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import DType, Region, convert_dtype, intersect, sizes, widest
from qwen3_npu.checkpoint.mapping.slices import TensorSlice
from qwen3_npu.checkpoint.mapping.source import view_of
from qwen3_npu.checkpoint.mapping.table import Shard
from qwen3_npu.errors import UsageError

Where = TypeVar("Where")


class SliceLocation(NamedTuple):
    """Where a slice of a Hugging Face tensor lies."""

    slice: TensorSlice
    shard: Shard
    where: Any


class ShardReader(abc.ABC, Generic[Where]):
    """A `Source` over Megatron tensors. What a tensor is, and how a region of it is read, a subclass says.

    Args:
        holders: every Megatron tensor and where it is, the preferred one of several copies first.
        what: names the checkpoint in messages.
    """

    def __init__(self, holders: Iterable[tuple[Where, Shard]], what: str) -> None:
        self.what = what
        self.dtypes: dict[str, DType] = {}
        self.places: dict[str, dict[Region, list[SliceLocation]]] = {}
        for where, shard in holders:
            for part in shard.slices:
                if not part.padding:
                    by_region = self.places.setdefault(part.hf, {})
                    by_region.setdefault(part.source, []).append(SliceLocation(part, shard, where))

    @abc.abstractmethod
    def find(self, holder: SliceLocation) -> Any:
        """The stored tensor of a holder, or None if it is not there. Raises: UsageError: it has another shape."""

    @abc.abstractmethod
    def stored_dtype(self, holder: SliceLocation, tensor: Any) -> DType: ...

    @abc.abstractmethod
    def read_stored(self, holder: SliceLocation, tensor: Any, region: Region) -> np.ndarray:
        """A region (of the shard's view) of a stored tensor."""

    def _holder(self, name: str, source: Region) -> tuple[SliceLocation, Any]:
        """The first holder that has this slice: replicas are the same, and of some only one rank writes its copy."""
        for holder in self.places[name][source]:
            tensor = self.find(holder)
            if tensor is not None:
                return holder, tensor
        raise UsageError(f"{self.what}: no file holds {name}")

    def dtype(self, name: str) -> DType:
        """Of the tensors that hold its parts; if these differ, the smallest that holds the values of all."""
        if name not in self.dtypes:
            self.dtypes[name] = widest(self.stored_dtype(*self._holder(name, part)) for part in self.places[name])
        return self.dtypes[name]

    def read(self, name: str, region: Region) -> np.ndarray:
        """A part of one Hugging Face tensor, put together from the tensors that hold it."""
        out: np.ndarray | None = None
        for source in self.places[name]:
            common = intersect(region, source)
            if common is None:
                continue
            holder, tensor = self._holder(name, source)
            stored = self.stored_dtype(holder, tensor)
            data = self.read_stored(holder, tensor, holder.slice.part(common))
            data = data.reshape(data.shape[data.ndim - len(common) :])
            data = convert_dtype(data.T if holder.slice.transposed else data, stored, self.dtype(name))
            if common == region:
                return data
            if out is None:
                out = np.empty(sizes(region), data.dtype)
            view_of(out, common, region)[...] = data
        if out is None:
            raise AssertionError(f"no slice of {name} lies in {region}")
        return out
