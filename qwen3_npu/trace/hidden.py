"""Exposed communication without and with each way to hide it: the same training is traced for each way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from qwen3_npu.args.parallel import OverlapArgs
from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.plan.device import Device
from qwen3_npu.platform.base import Platform
from qwen3_npu.trace.overlap import Played
from qwen3_npu.trace.rank import RankTrace, trace_rank
from qwen3_npu.trace.report import play
from qwen3_npu.training.prepare.plan import plan_training


def _without(args: PretrainArgs) -> PretrainArgs:
    train = dataclasses.replace(args.train, moe_alltoall_overlap_comm=False)
    return args._replace(overlap=OverlapArgs(), train=train)


def _experts(args: PretrainArgs) -> PretrainArgs:
    if args.parallel.expert_model_parallel_size == 1:
        return _without(args)
    return _without(args)._replace(train=dataclasses.replace(args.train, moe_alltoall_overlap_comm=True))


def _interleaved(args: PretrainArgs) -> PretrainArgs:
    parallel = args.parallel
    is_staged = parallel.pipeline_model_parallel_size > 1 and parallel.num_layers_per_virtual_pipeline_stage is None
    if parallel.expert_model_parallel_size == 1 or is_staged:
        return _without(args)
    return _without(args)._replace(overlap=OverlapArgs(moe_fb_overlap=True))


def _interleaved_pieces(args: PretrainArgs) -> PretrainArgs:
    way = _interleaved(args)
    return _experts(args)._replace(overlap=way.overlap) if way.overlap.moe_fb_overlap else way


def _in_pieces(args: PretrainArgs) -> PretrainArgs:
    return _without(args)._replace(overlap=dataclasses.replace(_pieces(args), use_ascend_coc=True))


def _fused(args: PretrainArgs) -> PretrainArgs:
    return _without(args)._replace(overlap=dataclasses.replace(_pieces(args), use_ascend_mc2=True))


def _pieces(args: PretrainArgs) -> OverlapArgs:
    return OverlapArgs(coc_parallel_num=args.overlap.coc_parallel_num)


# What a column is called, and the flags of it; groups of ranks whose communication it hides.
WAYS: dict[str, Callable[[PretrainArgs], PretrainArgs]] = {
    "off": _without,
    "--use-ascend-coc": _in_pieces,
    "--use-ascend-mc2": _fused,
    "--moe-alltoall-overlap-comm": _experts,
    "--moe-fb-overlap": _interleaved,
    "both flags of experts": _interleaved_pieces,
}


def traced_ways(
    platform: Platform, args: PretrainArgs, *, devices: int, rank: int
) -> Iterator[tuple[str, RankTrace, int]]:
    """Each way that changes this training, the trace of a rank with it, and a step's number of micro-batches."""
    seen: list[PretrainArgs] = []
    for name, changed in WAYS.items():
        way = changed(args)
        if args.parallel.tensor_model_parallel_size == 1:
            way = way._replace(overlap=OverlapArgs(moe_fb_overlap=way.overlap.moe_fb_overlap))
        if way in seen:
            continue
        seen.append(way)
        plan = plan_training(way, devices)
        yield name, trace_rank(platform, way, plan, rank), plan.num_microbatches


def played_ways(
    platform: Platform, args: PretrainArgs, device: Device, *, devices: int, rank: int
) -> Iterator[tuple[str, Played]]:
    """The same, played on a device's streams."""
    for name, trace, passes in traced_ways(platform, args, devices=devices, rank=rank):
        yield name, play(trace, device, passes)


def hidden_table(ways: list[tuple[str, Played]]) -> list[str]:
    """Lines with the time of the step, and its exposed communication by group."""
    lines = ["trace: " + f"{'played on streams (without bubble and host)':<44}" + "".join(f"{n:>28}" for n, _ in ways)]
    lines.append(f"trace:   {'step':<42}" + "".join(f"{step.total:>26.3f} s" for _, step in ways))
    for group in sorted({group for _, step in ways for group in step.exposed}):
        cells = [(step.exposed.get(group, 0.0), step.total) for _, step in ways]
        words = "".join(f"{f'{seconds:.3f} s {100 * seconds / total:5.1f} %':>28}" for seconds, total in cells)
        lines.append(f"trace:   {f'nothing hides {group}':<42}{words}")
    return lines
