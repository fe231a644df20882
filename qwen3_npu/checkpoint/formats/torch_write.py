"""Write Megatron checkpoints in the torch format: the files of each model rank, for conversions and trainings.

<iteration>/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt   weights, args, and in a training schedule and random state
                                  /optimizer.pt         in a training: float32 weights and moments, as its parameters
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import F32, DType
from qwen3_npu.checkpoint.binary.torch_zip_read import PtFile
from qwen3_npu.checkpoint.binary.torch_zip_write import PtWriter, Tensor
from qwen3_npu.checkpoint.formats.base import STATES, FileJob, Item, RankState, Stored, Target
from qwen3_npu.checkpoint.formats.torch_read import OPTIMIZER, WEIGHTS
from qwen3_npu.checkpoint.mapping.table import Shard
from qwen3_npu.distributed.layout import Rank
from qwen3_npu.files import Seal


def jobs(target: Target, rank: Rank, state: RankState | None = None) -> list[FileJob]:
    """The files of one rank. `state` is given by trainings only."""
    found: list[FileJob] = [RankWeightFile(target, rank, state)]
    if state is not None and state.held.keys() & STATES:
        found.append(StateFile(target, rank, state))
    return found


def finish(target: Target, stage: Path, notes: list[object]) -> dict[str, Seal]:
    """Files that belong to all ranks: none."""
    return {}


@dataclasses.dataclass(frozen=True)
class _RankFile:
    """A file of one rank; see `FileJob`."""

    target: Target
    rank: Rank
    state: RankState | None
    file: ClassVar[str]

    @property
    def name(self) -> str:
        return f"{self.target.layout.folder(self.rank)}/{self.file}"

    def _held(self, key: str) -> list[tuple[Shard, DType]]:
        """The rank's tensors of a kind ("": weights), chunk by chunk: the order in which the file announces them."""
        shards = sorted(self.target.contents.shards(self.target.layout, self.rank), key=lambda shard: shard.chunk)
        if self.state is None:
            return [(s, self.target.dtype_of(s)) for s in shards]
        held = self.state.held[key]
        return [(s, held[s.chunk, s.name]) for s in shards if (s.chunk, s.name) in held]


class RankWeightFile(_RankFile):
    """One rank's `model_optim_rng.pt`."""

    file = WEIGHTS

    def _key(self, chunk: int) -> str:
        return "model" if self.target.layout.virtual == 1 else f"model{chunk}"

    def items(self) -> list[Item]:
        return [Item(f"{self._key(s.chunk)}.{s.name}", s, dtype) for s, dtype in self._held("")]

    def write(self, path: Path, tensors: Iterator[np.ndarray]) -> tuple[Seal, object]:
        models: dict[str, dict[str, Tensor]] = {self._key(chunk): {} for chunk in range(self.target.layout.virtual)}
        for _, shard, dtype, _ in self.items():
            models[self._key(shard.chunk)][shard.name] = Tensor(dtype, shard.shape)
        content = {**self.target.common, **models}
        last: tuple[np.ndarray, ...] = ()
        if self.state is not None and self.state.random is not None:
            content["rng_state"], last = self.state.random, self.state.random_data
        return write_archive(path, content, itertools.chain(tensors, last)), None

    def stored(self, path: Path) -> dict[str, Stored]:
        file = PtFile(path)
        file.close()
        models = {key: value for key, value in file.content.items() if key.startswith("model")}
        return {
            f"{key}.{name}": Stored(ref.dtype, ref.shape)
            for key, model in models.items()
            for name, ref in model.items()
        }


class StateFile(_RankFile):
    """One rank's `optimizer.pt`, of a training."""

    file = OPTIMIZER

    def items(self) -> list[Item]:
        return [Item(f"{key}.{s.chunk}.{s.name}", s, F32, key) for key in STATES for s, _ in self._held(key)]

    def write(self, path: Path, tensors: Iterator[np.ndarray]) -> tuple[Seal, object]:
        held: dict[str, dict[int, dict[str, Tensor]]] = {key: {} for key in STATES}
        for _, shard, dtype, key in self.items():
            held[key].setdefault(shard.chunk, {})[shard.name] = Tensor(dtype, shard.shape)
        assert self.state is not None
        return write_archive(path, {"step": self.state.step, "state": held}, tensors), None

    def stored(self, path: Path) -> dict[str, Stored]:
        raise AssertionError("a conversion writes none")


def write_archive(path: Path, content: Mapping[str, object], tensors: Iterator[np.ndarray]) -> Seal:
    """A torch archive: plain data with `Tensor`s in it, and the data of these in order; flushed to disk."""
    writer = PtWriter(path, dict(content))
    for data in tensors:
        writer.write(data)
    seal = writer.close()
    assert seal is not None
    return seal
