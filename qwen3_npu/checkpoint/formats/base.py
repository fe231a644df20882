"""The interface that the readers and writers of all formats share."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import DType, widest
from qwen3_npu.checkpoint.formats.megatron_args import CHECKPOINT_VERSION, ITERATION, lora_args, to_args
from qwen3_npu.checkpoint.mapping.source import OWN_DTYPES, Contents, is_lora
from qwen3_npu.checkpoint.mapping.table import Shard
from qwen3_npu.distributed.layout import Layout, Rank, single_layout
from qwen3_npu.errors import UsageError
from qwen3_npu.files import Seal

STATES = ("param", "exp_avg", "exp_avg_sq")  # of each trained parameter: float32 weight and moments
RECORD = ".record.json"  # beside a finished file of a conversion that goes on
PLAN = "plan.json"
Shapes = Mapping[str, tuple[int, ...]]


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


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A finished file.

    Attributes:
        bytes, digest: of the file.
        tensors: digest of each tensor's bytes.
        notes: what the job's `write` returned.
    """

    bytes: int
    digest: str
    tensors: dict[str, str]
    notes: object = None

    @property
    def seal(self) -> Seal:
        return Seal(self.bytes, self.digest)


def job_bytes(job: FileJob) -> int:
    """Bytes of the tensors of a job."""
    return sum(item.bytes for item in job.items())


def remove_records(stage: Path) -> None:
    """Drop the records once every file is finished."""
    for path in [*stage.rglob("*" + RECORD), stage / PLAN]:
        path.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Target:
    """A Megatron checkpoint to be written, in any format.

    Attributes:
        dtype, lora_dtype: of the model's weights, and of LoRA tensors.
        trained: content of every file of a training beside its tensors: args, iteration, schedule.
        kept: Hugging Face (and PEFT) names of the tensors that have another dtype. A tensor that is joined from several
            tensors has the smallest dtype that holds the values of all.
        prompts: entries of the args that tell how the prompts of a training were written.
        own: `kept` before torch_dist made the dtypes of all layers equal; the way back gives each tensor its own dtype.
    """

    contents: Contents
    layout: Layout
    dtype: DType
    lora_dtype: DType
    trained: Mapping[str, object] | None = None
    kept: Mapping[str, DType] = dataclasses.field(default_factory=dict)
    own: Mapping[str, DType] = dataclasses.field(default_factory=dict)
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def common(self) -> Mapping[str, Any]:
        """The content of every file beside its tensors."""
        if self.trained is not None:
            return self.trained
        dtype = self.dtype if self.contents.base else self.lora_dtype
        args = to_args(self.contents.arch, self.layout, dtype) | {"iteration": ITERATION, **self.prompts}
        if self.contents.lora:
            args |= lora_args(self.contents.lora)
        if own := self._narrowed():
            args[OWN_DTYPES] = own
        return {"args": argparse.Namespace(**args), "checkpoint_version": CHECKPOINT_VERSION, "iteration": ITERATION}

    def dtype_of(self, shard: Shard) -> DType:
        usual = self._usual(shard)
        return widest(self.kept.get(piece.hf, usual) for piece in shard.slices) if self.kept else usual

    def _whole(self) -> Iterator[Shard]:
        """The tensors of an unsharded model."""
        layout = dataclasses.replace(single_layout(self.contents.arch), stacked_experts=self.layout.stacked_experts)
        return self.contents.shards(layout, Rank(0, 0, 0, 0))

    def _usual(self, shard: Shard) -> DType:
        return self.lora_dtype if is_lora(shard.name) else self.dtype

    def _narrowed(self) -> dict[str, list[str]]:
        """Dtype -> names of the tensors that have it and are stored in a wider one."""
        found: dict[str, dict[str, None]] = {}
        for shard in self._whole() if self.own else ():
            stored = self.dtype_of(shard)
            for piece in shard.slices:
                own = self.own.get(piece.hf, self._usual(shard))
                if own is not stored and not piece.padding:
                    found.setdefault(own.torch, {})[piece.hf] = None
        return {dtype: list(names) for dtype, names in found.items()}

    def joined(self) -> list[str]:
        """Tensors made of several dtypes, in an unsharded model."""
        shards = self._whole() if self.kept else ()
        return [s.name for s in shards if len({self.kept.get(p.hf, self._usual(s)) for p in s.slices}) > 1]


@dataclasses.dataclass(frozen=True)
class RankState:
    """What one rank of a training saves. A conversion saves the weights of all shards and nothing else.

    Attributes:
        held: "" and `STATES` -> (chunk, name) -> dtype of the tensors that are here.
        step: optimizer steps made.
        random: states of the random generators, with `Tensor`s in place of tensors; None: not saved.
        random_data: the data of those.
    """

    held: Mapping[str, Mapping[tuple[int, str], DType]]
    step: int = 0
    random: Any = None
    random_data: tuple[np.ndarray, ...] = ()


class MegatronWriter(Protocol):
    """A module that writes a Megatron format, for conversions and trainings."""

    def jobs(self, target: Target, rank: Rank, state: RankState | None = None) -> list[FileJob]:
        """The files of one rank; with `state`, of a training's."""

    def finish(self, target: Target, stage: Path, notes: list[Any]) -> dict[str, Seal]:
        """Make the files that belong to all ranks, from the notes of all files."""


def kept_dtypes(shapes: Shapes, dtype_of: Callable[[str], DType]) -> tuple[DType, DType, dict[str, DType]]:
    """The dtype of most weights, that of most LoRA tensors, and those of the tensors that have another.

    Args:
        shapes: of every Hugging Face and PEFT tensor.
        dtype_of: the dtype of each tensor. A tensor for which it raises a `UsageError` is passed over: the error is
            raised again when the tensor is read.
    """
    found: dict[str, DType] = {}
    missing: UsageError | None = None
    for name in shapes:
        try:
            found[name] = dtype_of(name)
        except UsageError as error:
            missing = error
    numbers: dict[bool, collections.Counter[DType]] = {False: collections.Counter(), True: collections.Counter()}
    for name, dtype in found.items():
        numbers[_of_adapter(name)][dtype] += math.prod(shapes[name])
    if missing is not None and not found:
        raise missing
    weights, lora = (numbers[kind] or numbers[not kind] for kind in (False, True))
    most = {False: weights.most_common(1)[0][0], True: lora.most_common(1)[0][0]}
    kept = {name: dtype for name, dtype in found.items() if dtype is not most[_of_adapter(name)]}
    return most[False], most[True], kept


def same_in_all_layers(
    dtype: DType, lora_dtype: DType, kept: Mapping[str, DType], shapes: Shapes
) -> tuple[DType, DType, dict[str, DType]]:
    """The same for torch_dist. It stores one tensor for all layers (and experts), so all of them have one dtype.

    Gate and up are one tensor too, but their chunks are stored separately, so each keeps its dtype.
    """
    groups: dict[str, list[str]] = {}
    for name in shapes if kept else ():
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", name).replace(".up_proj.", ".gate_proj."), []).append(name)
    wide: dict[str, DType] = {}
    for names in groups.values():
        usual = lora_dtype if _of_adapter(names[0]) else dtype
        if (found := widest(kept.get(name, usual) for name in names)) is not usual:
            wide |= dict.fromkeys(names, found)
    return dtype, lora_dtype, wide


def _of_adapter(name: str) -> bool:
    return name.startswith("base_model.")
