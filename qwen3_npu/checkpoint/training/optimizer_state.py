"""Optimizer state as tensors of the parameters' own shapes: float32 weight, first and second moment of each.

In this form the weight table says where every part belongs, so the state is saved and resumed in any layout. megatron's
distributed optimizer keeps flat shards instead. To save them, each rank copies its slices to the host and writes them
to a file in the staging folder; the rank that writes the checkpoint's files joins those of its data-parallel group. No
collective is called: with --async-save it could delay the training, and without it one rank would receive everything.
Loading scatters the state from data-parallel rank 0.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer

from qwen3_npu.checkpoint.binary.dtypes import full
from qwen3_npu.checkpoint.binary.torch_zip_read import PtFile
from qwen3_npu.checkpoint.formats.torch_write import STATES
from qwen3_npu.checkpoint.training.live import copied_to_host, write_content
from qwen3_npu.files import rename

KEYS = STATES
ParameterNames = dict[torch.nn.Parameter, tuple[int, str]]  # parameter -> virtual chunk, name


def parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that hold parameters: experts have one of their own."""
    found = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [part for part in found if part.optimizer is not None]


def _settled(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """`parts`, after copies to the host (--swap-optimizer) have finished."""
    found = parts(optimizer)
    for part in found:
        if (sliced := vars(part).get("sliced")) is not None:
            sliced.wait()
    return found


def is_distributed(optimizer: MegatronOptimizer) -> bool:
    """Whether its state is sharded over data-parallel ranks."""
    return any(isinstance(part, DistributedOptimizer) for part in parts(optimizer))


def gather_weights(optimizer: MegatronOptimizer) -> None:
    """Gather the weights now: with --overlap-param-gather they are gathered in the next step's forward pass.

    Until then a rank has the last update of its own share of them only. Every rank must call this.
    """
    sharded = [part for part in parts(optimizer) if isinstance(part, DistributedOptimizer)]
    for wrapped in {id(chunk): chunk for part in sharded for chunk in part.model_chunks}.values():
        if wrapped.ddp_config.overlap_param_gather:
            wrapped.start_param_sync(force_sync=True)


def parameter_names(chunks: Sequence[torch.nn.Module]) -> ParameterNames:
    """Names of the trained parameters of the model chunks (not wrapped)."""
    return {p: (i, name) for i, chunk in enumerate(chunks) for name, p in chunk.named_parameters() if p.requires_grad}


def step_count(optimizer: MegatronOptimizer) -> int:
    """Optimizer steps made so far."""
    steps = {int(state["step"]) for part in parts(optimizer) for state in part.optimizer.state.values()}
    return max(steps, default=0)


def named(optimizer: MegatronOptimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """(description, tensor) of each float32 weight and moment in this rank's share."""
    for part in _settled(optimizer):
        for main, state in part.optimizer.state.items():
            yield "a float32 weight of the optimizer", main
            yield from ((f"a tensor {key} of the optimizer", state[key]) for key in KEYS[1:] if key in state)


Gathered = dict[tuple[int, str], dict[str, torch.Tensor]]


def gather(optimizer: MegatronOptimizer, names: ParameterNames, *, copy: bool = False) -> Gathered:
    """(chunk, name) -> {param, exp_avg, exp_avg_sq}, float32, each of the parameter's local shape.

    Every rank must call this. With a distributed optimizer a rank gets the tensors of the parameters for which it is
    data-parallel rank 0 (dense and experts have different groups), as copies on the host. Without one, the tensors are
    the optimizer's own, unless a copy is requested.
    """
    found: Gathered = {}
    for part in _settled(optimizer):
        if isinstance(part, DistributedOptimizer):
            flat = part.get_parameter_state_dp_zero()
            if flat is not None:
                for parameter, views in _views(part, flat):
                    found[names[parameter]] = views
        else:
            for parameter, main in main_parameters(part):
                state = part.optimizer.state[main]
                nothing = torch.zeros((), device=main.device).expand(main.shape)  # Muon's matrices have one moment
                tensors = {"param": main.detach(), **{k: state.get(k, nothing) for k in KEYS[1:]}}
                found[names[parameter]] = {k: t.to("cpu", copy=True) if copy else t for k, t in tensors.items()}
    return found


def states_by_parameter(optimizer: MegatronOptimizer) -> dict[torch.nn.Parameter, dict[str, torch.Tensor]]:
    """Model parameter -> the optimizer's own {param, exp_avg, exp_avg_sq}; empty for a distributed optimizer."""
    return {
        parameter: {
            "param": main,
            **{k: part.optimizer.state[main][k] for k in KEYS[1:] if k in part.optimizer.state[main]},
        }
        for part in _settled(optimizer)
        if not isinstance(part, DistributedOptimizer)
        for parameter, main in main_parameters(part)
    }


@torch.no_grad()
def restore(
    optimizer: MegatronOptimizer, names: ParameterNames, step: int, read: Callable[[int, str, str], torch.Tensor]
) -> None:
    """The reverse of `gather`. Every rank must call this.

    Args:
        step: optimizer steps made before.
        read: (chunk, name, key) -> tensor of the parameter's local shape; called on the ranks that need the tensor.
    """
    for part in _settled(optimizer):
        if isinstance(part, DistributedOptimizer):
            _restore_distributed(part, names, read)
        else:
            for parameter, main in main_parameters(part):
                main.copy_(read(*names[parameter], "param"))
                for key in KEYS[1:]:
                    if key in part.optimizer.state[main]:
                        part.optimizer.state[main][key].copy_(read(*names[parameter], key))
        for state in part.optimizer.state.values():
            state["step"].fill_(step)


def main_parameters(part: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """(model parameter, the float32 tensor that the optimizer updates); of a distributed one, this rank's slice."""
    if isinstance(part, DistributedOptimizer):
        halves = zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True)
        singles = zip(part.model_fp32_groups, part.shard_fp32_groups, strict=True)
        for parameters, mains in itertools.chain(halves, singles):
            yield from zip(parameters, mains, strict=True)
    elif hasattr(part, "float16_groups"):
        for halves, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from zip(halves, mains, strict=True)
        for group in part.fp32_from_fp32_groups:
            yield from ((p, p) for p in group)
    else:
        for group in part.optimizer.param_groups:
            yield from ((p, p) for p in group["params"])


def _views(part: DistributedOptimizer, flat: dict) -> Iterator[tuple[torch.nn.Parameter, dict[str, torch.Tensor]]]:
    """Each parameter's place in the flat buffers of `get_parameter_state_dp_zero`.

    The buffers hold all buckets one after the other, without the padding between them.
    """
    for index, buffer in enumerate(part.buffers):
        tensors = next(iter(flat[index].values()))
        starts, total = [], 0
        for bucket in buffer.buckets:
            starts.append(total - bucket.offset)
            total += bucket.numel_unpadded
        for parameter, (begin, end, bucket) in buffer.param_index_map.items():
            place = slice(starts[bucket] + begin, starts[bucket] + end)
            yield parameter, {key: tensors[key][place].view(parameter.shape) for key in KEYS}


def _restore_distributed(
    part: DistributedOptimizer, names: ParameterNames, read: Callable[[int, str, str], torch.Tensor]
) -> None:
    flat: dict[object, object] | None = None
    if part.data_parallel_group_gloo.rank() == 0:
        flat = {"buckets_coalesced": True}
        for index, ranges in enumerate(part.gbuf_ranges):
            size = part.buffers[index].numel_unpadded
            tensors: dict[str, object] = {key: torch.empty(size, dtype=torch.float32) for key in KEYS}
            flat[index] = {dtype: {**tensors, "numel_unpadded": size} for dtype in ranges}
        for parameter, views in _views(part, flat):
            for key, view in views.items():
                view.copy_(read(*names[parameter], key))
    # megatron-core 0.16.1 copies every entry of the state, also torch's own step, which the checkpoint lacks there
    # (KeyError), and its load_state_dict gives all parameters one step tensor, which then counts once per parameter
    # (silently wrong updates). So the steps are taken out, and each keeps its own.
    steps = {main: state.pop("step") for main, state in part.optimizer.state.items()}
    part.load_parameter_state_from_dp_zero(flat)
    for main, step in steps.items():
        part.optimizer.state[main]["step"] = step


ParameterKey = tuple[int, str]  # virtual chunk, name


@dataclasses.dataclass(frozen=True)
class _Part:
    """The share of one optimizer's state that this rank holds.

    Attributes:
        file: the file of its slices; its number is the rank.
        ranks: of the data-parallel group; the first rank joins the state.
        shapes: of all parameters.
        slices: parameter -> {"start": place in the flat parameter, and float32 tensors under `KEYS`}.
    """

    file: str
    ranks: list[int]
    shapes: dict[ParameterKey, torch.Size]
    slices: dict[ParameterKey, dict[str, object]]

    def others(self) -> list[str]:
        """Files of the ranks whose slices this rank joins."""
        return [self.file.format(rank) for rank in self.ranks[1:]] if self.ranks[0] == dist.get_rank() else []


class ShardedState:
    """A copy of this rank's share of the state, made without a collective call."""

    def __init__(self, optimizer: MegatronOptimizer, names: ParameterNames) -> None:
        self.parts = []
        for number, part in enumerate(_settled(optimizer)):
            assert isinstance(part, DistributedOptimizer)
            shapes = {names[p]: p.shape for buffer in part.buffers for p in buffer.param_index_map}
            ranks = dist.get_process_group_ranks(part.data_parallel_group_gloo)
            self.parts.append(_Part(f"slices.{number}.{{:05d}}", ranks, shapes, dict(_slices(part, names))))

    def put(self, stage: Path) -> None:
        """Write the slices for the rank that joins them."""
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


def _slices(part: DistributedOptimizer, names: ParameterNames) -> Iterator[tuple[ParameterKey, dict[str, Any]]]:
    for buckets in part.gbuf_ranges:
        for ranges in (bucket for dtype in buckets.values() for bucket in dtype):
            for parameter, place in ranges["param_map"].items():
                state = part._get_main_param_and_optimizer_states(parameter)
                yield (
                    names[parameter],
                    {"start": place["param"].start, **copied_to_host({key: state[key] for key in KEYS})},
                )


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
