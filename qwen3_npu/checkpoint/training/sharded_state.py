"""The state of a distributed optimizer, gathered through files: no collective call holds up the training.

Each rank copies its slices to the host and, while the training goes on, writes them to a file of the stage. The rank
that writes the checkpoint's files puts the slices of its data-parallel group together, and deletes those files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from qwen3_npu.checkpoint.binary.dtypes import full
from qwen3_npu.checkpoint.binary.torch_zip_read import PtFile
from qwen3_npu.checkpoint.training.live import on_host, write_content
from qwen3_npu.checkpoint.training.optimizer_state import KEYS, Gathered, Names, parts
from qwen3_npu.files import rename

ParameterKey = tuple[int, str]  # virtual chunk, name


@dataclasses.dataclass(frozen=True)
class _Part:
    """What this rank has of one optimizer.

    Attributes:
        file: what its slices are written to; the number is that of the rank.
        ranks: of the data-parallel group; the first puts the state together.
        shapes: of all parameters.
        slices: parameter -> {"start": place in the flat parameter, and float32 tensors under `KEYS`}.
    """

    file: str
    ranks: list[int]
    shapes: dict[ParameterKey, torch.Size]
    slices: dict[ParameterKey, dict[str, Any]]

    def others(self) -> list[str]:
        """Files of the ranks whose slices this rank puts together."""
        return [self.file.format(rank) for rank in self.ranks[1:]] if self.ranks[0] == dist.get_rank() else []


class ShardedState:
    """A copy of what this rank has of the state; made without a collective call."""

    def __init__(self, optimizer: MegatronOptimizer, names: Names) -> None:
        self.parts = []
        for number, part in enumerate(parts(optimizer)):
            assert isinstance(part, DistributedOptimizer)
            shapes = {names[p]: p.shape for buffer in part.buffers for p in buffer.param_index_map}
            ranks = dist.get_process_group_ranks(part.data_parallel_group_gloo)
            self.parts.append(_Part(f"slices.{number}.{{:05d}}", ranks, shapes, dict(_slices(part, names))))

    def put(self, stage: Path) -> None:
        """Write what other ranks put together."""
        for part in self.parts:
            if part.ranks[0] != dist.get_rank():
                path = stage / part.file.format(dist.get_rank())
                temporary = path.with_name(path.name + ".tmp")
                by_chunk: dict[int, dict[str, Any]] = {}
                for (chunk, name), held in part.slices.items():
                    by_chunk.setdefault(chunk, {})[name] = held
                write_content(temporary, by_chunk)
                rename(temporary, path)

    def awaited(self) -> list[str]:
        """Files that must be there before `collect`."""
        return [file for part in self.parts for file in part.others()]

    def collect(self, stage: Path) -> Gathered:
        """As `optimizer_state.gather`: the parameters that this rank is data-parallel rank 0 for."""
        found: Gathered = {}
        for part in self.parts:
            if part.ranks[0] != dist.get_rank():
                continue
            whole = {p: {key: torch.empty(math.prod(shape)) for key in KEYS} for p, shape in part.shapes.items()}
            _fill(whole, part.slices)
            for name in part.others():
                for place, held in _read(stage / name):
                    _fill(whole, {place: held})
                (stage / name).unlink()
            for place, tensors in whole.items():
                found[place] = {key: tensor.view(part.shapes[place]) for key, tensor in tensors.items()}
        return found


def _slices(part: DistributedOptimizer, names: Names) -> Iterator[tuple[ParameterKey, dict[str, Any]]]:
    for buckets in part.gbuf_ranges:
        for ranges in (bucket for dtype in buckets.values() for bucket in dtype):
            for parameter, place in ranges["param_map"].items():
                state = part._get_main_param_and_optimizer_states(parameter)
                yield names[parameter], {"start": place["param"].start, **on_host({key: state[key] for key in KEYS})}


def _read(path: Path) -> Iterator[tuple[ParameterKey, dict[str, Any]]]:
    file = PtFile(path)
    for chunk, by_name in file.content.items():
        for name, held in by_name.items():
            tensors = {k: torch.from_numpy(file.read(held[k], held[k].shape, full(held[k].shape))) for k in KEYS}
            yield (chunk, name), {"start": held["start"], **tensors}
    file.close()


def _fill(whole: Gathered, slices: dict[ParameterKey, dict[str, Any]]) -> None:
    for place, held in slices.items():
        for key in KEYS:
            start, tensor = held["start"], held[key].flatten()
            whole[place][key][start : start + tensor.numel()] = tensor
