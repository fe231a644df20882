"""What a checkpoint holds, and the interfaces of both sides: a `Source` is read, a `FileJob` is written.

A source gives regions of tensors under Hugging Face names. `ShardReader` is one over Megatron tensors, whatever the
files are.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import (
    F32,
    DType,
    Region,
    as_index,
    convert_dtype,
    from_float32,
    full,
    intersect,
    relative,
    row_blocks,
    sizes,
    to_float32,
    widest,
)
from qwen3_npu.checkpoint.mapping.lora import Lora, adapter_shards, base_shard
from qwen3_npu.checkpoint.mapping.table import SCORE, Shard, TensorSlice, covered, shards
from qwen3_npu.distributed.layout import Layout, Rank, single_layout
from qwen3_npu.errors import UsageError, printable
from qwen3_npu.files import Seal
from qwen3_npu.model.arch import Qwen3Arch

Where = TypeVar("Where")
OWN_DTYPES = "own_dtypes"  # argument of a converted checkpoint: dtype -> tensors that are stored in a wider one


def is_lora(name: str) -> bool:
    """Whether a Megatron name is that of a LoRA tensor."""
    return "lora_" in name


def is_peft_name(name: str) -> bool:
    """Whether a name is PEFT's, and not Hugging Face's."""
    return name.startswith("base_model.")


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a checkpoint holds: the tensors of a model, of an adapter, or both.

    Attributes:
        base: whether it holds the model's own weights.
        lora: the adapter, if it holds LoRA tensors.
        without: Hugging Face names of weights that it does not hold.
    """

    arch: Qwen3Arch
    base: bool = True
    lora: Lora | None = None
    without: frozenset[str] = frozenset()

    def shards(self, layout: Layout, rank: Rank) -> Iterator[Shard]:
        """Every tensor of one rank's Megatron checkpoint."""
        if self.base:
            for shard in shards(self.arch, layout, rank):
                if self.without and self.without.issuperset(piece.hf for piece in shard.slices):
                    continue
                if self.lora is None:
                    yield shard
                elif shard.name != SCORE.megatron:  # it is the adapter's
                    yield base_shard(shard, self.lora)
        if self.lora:
            yield from adapter_shards(self.arch, self.lora, layout, rank)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every Hugging Face and PEFT tensor."""
        return covered(self.shards(single_layout(self.arch), Rank(0, 0, 0, 0)))

    @property
    def parameters(self) -> int:
        """How many numbers an unsharded checkpoint holds, without the padding of the vocabulary."""
        return sum(math.prod(shard.shape) for shard in self.shards(single_layout(self.arch), Rank(0, 0, 0, 0)))

    def __str__(self) -> str:
        return " with ".join(part for part in ("weights" * self.base, str(self.lora or "")) if part)


class Source(Protocol):
    """Tensors under their Hugging Face names (those of an adapter under PEFT's names)."""

    arch: Qwen3Arch
    contents: Contents

    def dtype(self, name: str) -> DType: ...

    def read(self, name: str, region: Region) -> np.ndarray: ...

    def close(self) -> None: ...


def read_tensor(source: Source, name: str, shape: tuple[int, ...], dtype: DType) -> np.ndarray:
    """One whole Hugging Face tensor in `dtype`."""
    out = np.empty(shape, dtype.carrier)
    stored = source.dtype(name)
    for block in row_blocks(full(shape), dtype.itemsize):
        out[as_index(block)] = _converted(source.read(name, block), stored, dtype, name)
    return out


def _converted(data: np.ndarray, stored: DType, dtype: DType, name: str) -> np.ndarray:
    """Values in another dtype. Raises: UsageError: a finite one is too large for it."""
    if stored is dtype:
        return data
    values = to_float32(data, stored)
    found = from_float32(values, dtype)
    if dtype is not F32 and (np.isinf(to_float32(found, dtype)) & np.isfinite(values)).any():
        largest = np.abs(values[np.isfinite(values)]).max()
        raise UsageError(
            f"{printable(name)} has a value of {largest:.4g}, which {dtype.torch} cannot hold; choose another "
            f"--params-dtype, or leave it out to keep each tensor's own"
        )
    return found


def read_shard(source: Source, shard: Shard, dtype: DType, out: np.ndarray | None = None) -> np.ndarray:
    """One Megatron tensor, joined from its slices and converted to `dtype`. Shape: `shard.shape`.

    Beside the result only a few MB are in memory, since slices are read in blocks.

    Args:
        out: a buffer for the result, large enough for it; by default a new one.

    Raises:
        UsageError: a finite value is too large for `dtype`.
    """
    if out is None:
        out = np.empty(shard.view, dtype.carrier)
    else:
        out = out[: math.prod(shard.view) * dtype.itemsize].view(dtype.carrier).reshape(shard.view)
    for piece in shard.slices:
        stored = source.dtype(piece.hf)
        for block in row_blocks(piece.source, dtype.itemsize):
            data = _converted(source.read(piece.hf, block), stored, dtype, piece.hf)
            out[as_index(piece.part(block))] = data.T if piece.transposed else data
    return out.reshape(shard.shape)


def view_of(out: np.ndarray, part: Region, whole: Region) -> np.ndarray:
    """The view of region `part` in `out`, which holds region `whole` of the same tensor."""
    return out[as_index(relative(part, whole))]


def listed(names: Iterable[str], limit: int = 5) -> str:
    """The first names, and the number of the others, for a message."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return printable(", ".join(ordered[:limit])) + more


def check_tensors(
    found: Mapping[str, tuple[int, ...] | None], wanted: Mapping[str, tuple[int, ...]], where: str, what: str
) -> None:
    """Check that exactly the wanted tensors exist, with their shapes.

    Args:
        found: name -> shape; None for an object that is no tensor.
        where, what: the file, and what decides which tensors belong in it, for messages.

    Raises:
        UsageError: tensors are missing, extra or of another shape.
    """
    if missing := wanted.keys() - found.keys():
        raise UsageError(f"{where}: tensors missing for {what}: {listed(missing)}")
    if extra := found.keys() - wanted.keys():
        raise UsageError(f"{where}: tensors not expected for {what}: {listed(extra)}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise UsageError(f"{where}: {name} has shape {found[name]}; {shape} expected for {what}")


class Item(NamedTuple):
    """A tensor to be written.

    Attributes:
        name: unique in its file.
        shard: the slices that it is made of.
        state: "" for a weight; one of `STATES` for a tensor of the optimizer.
    """

    name: str
    shard: Shard
    dtype: DType
    state: str = ""

    @property
    def bytes(self) -> int:
        return math.prod(self.shard.shape) * self.dtype.itemsize


class Stored(NamedTuple):
    """A tensor of a finished file."""

    dtype: DType | None
    shape: tuple[int, ...]


class FileJob(Protocol):
    """One output file."""

    @property
    def name(self) -> str:
        """Path relative to the output folder."""

    def items(self) -> list[Item]:
        """Every tensor of the file, in order."""

    def write(self, path: Path, tensors: Iterator[np.ndarray]) -> tuple[Seal, object]:
        """Write the data of `items` to the file and flush it to disk.

        Returns:
            Size and digest, computed while the file is written; and notes, from which `finish` makes the common files.
        """

    def stored(self, path: Path) -> dict[str, Stored]:
        """The tensors of a finished file, under the names of `items`. Raises: UsageError: it cannot be read."""


def job_bytes(job: FileJob) -> int:
    """Bytes of the tensors of a job."""
    return sum(item.bytes for item in job.items())


class SliceLocation(NamedTuple):
    """The place of a slice of a Hugging Face tensor."""

    slice: TensorSlice
    shard: Shard
    where: Any


class ShardReader(abc.ABC, Generic[Where]):
    """A `Source` over Megatron tensors. Subclasses define how a tensor is found and how a region of it is read.

    Args:
        holders: every Megatron tensor and its place; of several copies the preferred one comes first.
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
        """The stored tensor of a holder, or None if it does not exist. Raises: UsageError: it has another shape."""

    @abc.abstractmethod
    def stored_dtype(self, holder: SliceLocation, tensor: Any) -> DType: ...

    @abc.abstractmethod
    def read_stored(self, holder: SliceLocation, tensor: Any, region: Region) -> np.ndarray:
        """A region (of the shard's view) of a stored tensor."""

    def _holder(self, name: str, source: Region) -> tuple[SliceLocation, Any]:
        """The first holder that has this slice. Replicas are equal, and some formats store only one of them."""
        for holder in self.places[name][source]:
            tensor = self.find(holder)
            if tensor is not None:
                return holder, tensor
        raise UsageError(f"{self.what}: no file holds {name}")

    def dtype(self, name: str) -> DType:
        """The dtype of the tensors that hold its parts; if they differ, the smallest that holds all values."""
        if name in self.own:
            return self.own[name]
        if name not in self.dtypes:
            self.dtypes[name] = widest(self.stored_dtype(*self._holder(name, part)) for part in self.places[name])
        return self.dtypes[name]

    def _as_own(self, data: np.ndarray, stored: DType, name: str) -> np.ndarray:
        """The array in the tensor's own dtype. Raises: UsageError: this dtype can no longer hold its values."""
        dtype = self.dtype(name)
        found = convert_dtype(data, stored, dtype)
        if name in self.own and not np.array_equal(to_float32(found, dtype), to_float32(data, stored), equal_nan=True):
            raise UsageError(
                f"{self.what}: {printable(name)} was {dtype.torch} and has values now that this cannot hold; convert "
                f"it as it is stored with --ignore-args {OWN_DTYPES}"
            )
        return found

    def read(self, name: str, region: Region) -> np.ndarray:
        """A part of one Hugging Face tensor, joined from the tensors that hold it."""
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
