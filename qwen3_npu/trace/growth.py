"""Work of a rank besides computing, in jobs with more and more devices. Only data parallelism grows.

Seconds of a start and of a save are modelled: bytes over a node's share of the file system (`Device.storage`),
`Device.group` for each communicator, and a tree of log2(ranks) messages for each agreement.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.errors import UsageError
from qwen3_npu.plan.device import GIB, Device
from qwen3_npu.plan.from_args import setup_of
from qwen3_npu.plan.shape import shape_of
from qwen3_npu.plan.timing import step_time
from qwen3_npu.platform.base import Platform
from qwen3_npu.trace.rank import trace_rank
from qwen3_npu.trace.report import exchanged
from qwen3_npu.training.prepare.plan import plan_training

# Agreements of all ranks, counted in trainings of 2 and 4 processes (docs/planning.md).
_AT_START, _AT_SAVE = 14, 8


@dataclasses.dataclass(frozen=True)
class RankWork:
    """Work of rank 0 of a job besides computing.

    Attributes:
        communicators: number of groups with more than one rank that it joins.
        start: number of collectives before the first step, without those for data and weights.
        collectives, moved, waits: of a step: number, bytes, and seconds during which nothing else runs.
        writers: number of ranks that write model files of a checkpoint.
        state: bytes of weights and optimizer state on this rank.
        start_seconds: time to read this rank's weights, to make communicators and to agree.
        step_seconds: time of a step, by the plan.
        save_seconds: time to write this rank's model files and its part of the optimizer's state, and to join the
            parts.
    """

    devices: int
    communicators: int
    start: int
    collectives: float
    moved: float
    waits: float
    writers: int
    state: int
    start_seconds: float
    step_seconds: float
    save_seconds: float


def growth(
    platform: Platform, args: PretrainArgs, device: Device, *, devices: int, sizes: Iterable[int]
) -> list[RankWork]:
    """The same layout and micro-batches per rank on each number of devices.

    Args:
        devices: number of devices of the arguments.

    Raises:
        UsageError: a number of devices is no multiple of `devices`.
    """
    batch = plan_training(args, devices).global_batch
    return [_work(platform, args, device, size, batch=batch, devices=devices) for size in sizes]


def _work(platform: Platform, args: PretrainArgs, device: Device, size: int, *, batch: int, devices: int) -> RankWork:
    if size % devices:
        raise UsageError(f"--growth: {size} is no multiple of --devices {devices}")
    train = dataclasses.replace(args.train, global_batch_size=batch * size // devices)
    grown = args._replace(train=train)
    plan = plan_training(grown, size)
    trace = trace_rank(platform, grown, plan, 0)
    table = exchanged(trace, device, plan.num_microbatches).values()
    shape, setup = shape_of(plan.arch, plan.layout.padded_vocab_size), setup_of(grown, plan)
    share = device.storage / device.node
    agreement = device.network_latency * math.log2(max(size, 2))
    whole = trace.optimizer * (setup.data * setup.context if setup.distributed_optimizer else 1)
    return RankWork(
        devices=size,
        communicators=trace.communicators,
        start=len(trace.start),
        collectives=sum(row[0] for row in table),
        moved=sum(row[1] for row in table),
        waits=sum(row[2] for row in table),
        writers=len({plan.layout.folder(rank) for rank in plan.layout.ranks()}),
        state=trace.weights + trace.optimizer,
        start_seconds=trace.weights / share + trace.communicators * device.group + _AT_START * agreement,
        step_seconds=step_time(shape, setup, device).total,
        save_seconds=(trace.weights + trace.optimizer + whole) / share + _AT_SAVE * agreement,
    )


def growth_table(found: Iterable[RankWork]) -> list[str]:
    """A line for each number of devices."""
    lines = [
        f"{'ranks':>6}{'groups':>8}{'at start':>10}{'a step':>9}{'GiB':>9}{'waits':>10}{'writers':>9}{'state GiB':>11}"
        f"{'start':>9}{'step':>10}{'save':>9}"
    ]
    lines += [
        f"{work.devices:>6}{work.communicators:>8}{work.start:>10}{work.collectives:>9,.0f}{work.moved / GIB:>9.3f}"
        f"{work.waits:>8.3f} s{work.writers:>9}{work.state / GIB:>11.3f}"
        f"{work.start_seconds:>7.1f} s{work.step_seconds:>8.2f} s{work.save_seconds:>7.1f} s"
        for work in found
    ]
    return lines
