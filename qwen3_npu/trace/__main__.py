"""Trace the real training step of single ranks of a job of any size, on tensors without data: no device is needed.

python -m qwen3_npu.plan --trace --devices 256 --ranks 0,37 FLAGS OF pretrain_gpt.py
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwen3_npu import cli, log
from qwen3_npu.args.foreign import FOREIGN_TRAINING
from qwen3_npu.args.pretrain import GROUPS, PretrainArgs
from qwen3_npu.args.tools.trace import TraceArgs
from qwen3_npu.numbers import number_list
from qwen3_npu.plan.activations import TORCH
from qwen3_npu.plan.device import Device
from qwen3_npu.plan.from_args import setup_of
from qwen3_npu.plan.launch import DEFAULT, device_for
from qwen3_npu.plan.memory import stage_memory
from qwen3_npu.plan.shape import shape_of

if TYPE_CHECKING:
    from qwen3_npu.platform.base import Platform
    from qwen3_npu.training.prepare.plan import TrainingPlan

PROG = "python -m qwen3_npu.plan --trace"


def main() -> None:
    trace_flags(sys.argv[1:])


def trace_flags(words: Sequence[str]) -> None:
    """Trace the layout of these training flags, and print the result."""
    parsed = cli.parse(PROG, str(__doc__).split("\n\n")[0], (TraceArgs, *GROUPS), FOREIGN_TRAINING, argv=list(words))
    wanted, args = parsed.groups[0], PretrainArgs(*parsed.groups[1:])
    if not wanted.json:
        log.setup()
    verdict = args.verdict
    device = device_for(verdict.plan_device or DEFAULT, verdict.device_memory, verdict.device_table)
    data = trace(args, device, wanted)
    if wanted.json:
        print(json.dumps(data, indent=1))


def trace(args: PretrainArgs, device: Device, wanted: TraceArgs) -> list[dict[str, object]]:
    """Trace ranks, or the growth with the cluster, and print the result, unless JSON is wanted.

    Raises:
        UsageError: the flags do not fit each other.
    """
    from qwen3_npu.training.prepare.plan import plan_training

    plan = plan_training(args, wanted.devices)
    from qwen3_npu.platform import select_platform

    platform = select_platform("cpu")
    platform.activate()
    if wanted.growth is not None:
        return _growth(platform, args, device, wanted)
    if wanted.hidden:
        return _hidden(platform, args, device, wanted)
    from qwen3_npu.trace.rank import trace_rank
    from qwen3_npu.trace.report import as_json, describe

    shape, setup = shape_of(plan.arch, plan.layout.padded_vocab_size), setup_of(args, plan)
    data = []
    for rank in number_list(wanted.ranks) or _firsts(plan, wanted.devices):
        trace = trace_rank(platform, args, plan, rank)
        planned = stage_memory(shape, setup, trace.stage, kernels=TORCH)
        data.append(as_json(trace, planned, device, plan.num_microbatches))
        if not wanted.json:
            most = wanted.holders
            print("\n".join(describe(trace, planned, device, passes=plan.num_microbatches, most=most)), flush=True)
    return data


def _growth(platform: Platform, args: PretrainArgs, device: Device, wanted: TraceArgs) -> list[dict[str, object]]:
    from qwen3_npu.trace.growth import growth, growth_table

    work = growth(platform, args, device, devices=wanted.devices, sizes=number_list(wanted.growth))
    if not wanted.json:
        print("\n".join(growth_table(work)))
    return [dataclasses.asdict(row) for row in work]


def _hidden(platform: Platform, args: PretrainArgs, device: Device, wanted: TraceArgs) -> list[dict[str, object]]:
    from qwen3_npu.trace.hidden import hidden_table, played_ways

    first = (number_list(wanted.ranks) or [0])[0]
    ways = list(played_ways(platform, args, device, devices=wanted.devices, rank=first))
    if not wanted.json:
        print("\n".join(hidden_table(ways)))
    return [{"way": name, "step_seconds": step.total, "exposed_seconds": dict(step.exposed)} for name, step in ways]


def _firsts(plan: TrainingPlan, devices: int) -> list[int]:
    """The first rank of the first stage, of the last one, and of each stage with other layers than the one before."""
    chunks = plan.layout.chunks
    last, each = len(chunks) - 1, devices // len(chunks)
    sizes = [[len(chunk) for chunk in stage] for stage in chunks]
    stages = {0, last, *(stage for stage in range(1, last) if stage == 1 or sizes[stage] != sizes[stage - 1])}
    return [stage * each for stage in sorted(stages)]


if __name__ == "__main__":
    cli.run(PROG, main)
