"""Hugging Face tensors read by regions out of the Megatron tensors that hold their slices, in whatever files."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import DType, Region, convert_dtype, intersect, sizes, to_float32, widest
from qwen3_npu.checkpoint.mapping.slices import TensorSlice
from qwen3_npu.checkpoint.mapping.source import view_of
from qwen3_npu.checkpoint.mapping.table import Shard
from qwen3_npu.errors import UsageError, printable

Where = TypeVar("Where")
OWN_DTYPES = "own_dtypes"  # argument of a converted checkpoint: dtype -> tensors that are stored in a wider one


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
        self.own: Mapping[str, DType] = {}  # of tensors that were narrower before they were joined with others
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
        if name in self.own:
            return self.own[name]
        if name not in self.dtypes:
            self.dtypes[name] = widest(self.stored_dtype(*self._holder(name, part)) for part in self.places[name])
        return self.dtypes[name]

    def _as_own(self, data: np.ndarray, stored: DType, name: str) -> np.ndarray:
        """In the tensor's dtype. Raises: UsageError: values that were joined with wider ones have changed since."""
        dtype = self.dtype(name)
        found = convert_dtype(data, stored, dtype)
        if name in self.own and not np.array_equal(to_float32(found, dtype), to_float32(data, stored), equal_nan=True):
            raise UsageError(
                f"{self.what}: {printable(name)} was {dtype.torch} and has values now that this cannot hold; convert "
                f"it as it is stored with --ignore-args {OWN_DTYPES}"
            )
        return found

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
            data = self._as_own(data.T if holder.slice.transposed else data, stored, name)
            if common == region:
                return data
            if out is None:
                out = np.empty(sizes(region), data.dtype)
            view_of(out, common, region)[...] = data
        if out is None:
            raise AssertionError(f"no slice of {name} lies in {region}")
        return out
