"""Trace the real training step of single ranks of a job of any size, on tensors without data: no device is needed.

python -m qwen3_npu.trace --devices 256 --ranks 0,37 FLAGS OF pretrain_gpt.py
"""

from __future__ import annotations

import dataclasses
import json

from qwen3_npu import cli, log
from qwen3_npu.args.foreign import FOREIGN_TRAINING
from qwen3_npu.args.pretrain import GROUPS, PretrainArgs
from qwen3_npu.args.tools.trace import TraceArgs
from qwen3_npu.numbers import number_list
from qwen3_npu.plan.activations import TORCH
from qwen3_npu.plan.from_args import setup_of
from qwen3_npu.plan.launch import DEFAULT, device_for
from qwen3_npu.plan.memory import stage_memory
from qwen3_npu.plan.shape import shape_of
from qwen3_npu.training.prepare.plan import TrainingPlan, plan_training

PROG = "python -m qwen3_npu.trace"


def main() -> None:
    log.setup()
    parsed = cli.parse(PROG, str(__doc__).split("\n\n")[0], (TraceArgs, *GROUPS), FOREIGN_TRAINING)
    wanted, args = parsed.groups[0], PretrainArgs(*parsed.groups[1:])
    plan = plan_training(args, wanted.devices)
    verdict = args.verdict
    device = device_for(verdict.plan_device or DEFAULT, verdict.device_memory, verdict.device_table)
    from qwen3_npu.platform import select_platform
    from qwen3_npu.trace.rank import trace_rank
    from qwen3_npu.trace.report import as_json, describe

    platform = select_platform("cpu")
    platform.activate()
    if wanted.growth is not None:
        from qwen3_npu.trace.growth import growth, growth_table

        work = growth(platform, args, device, devices=wanted.devices, sizes=number_list(wanted.growth))
        rows = [dataclasses.asdict(row) for row in work]
        print(json.dumps(rows, indent=1) if wanted.json else "\n".join(growth_table(work)))
        return
    if wanted.hidden:
        from qwen3_npu.trace.hidden import hidden_table, played_ways

        first = (number_list(wanted.ranks) or [0])[0]
        ways = list(played_ways(platform, args, device, devices=wanted.devices, rank=first))
        steps = {name: {"step_seconds": step.total, "exposed_seconds": dict(step.exposed)} for name, step in ways}
        print(json.dumps(steps, indent=1) if wanted.json else "\n".join(hidden_table(ways)))
        return
    shape, setup = shape_of(plan.arch, plan.layout.padded_vocab_size), setup_of(args, plan)
    data = []
    for rank in number_list(wanted.ranks) or _ends(plan, wanted.devices):
        trace = trace_rank(platform, args, plan, rank)
        planned = stage_memory(shape, setup, trace.stage, kernels=TORCH)
        data.append(as_json(trace, planned, device, plan.num_microbatches))
        if not wanted.json:
            most = wanted.holders
            print("\n".join(describe(trace, planned, device, passes=plan.num_microbatches, most=most)), flush=True)
    if wanted.json:
        print(json.dumps(data, indent=1))


def _ends(plan: TrainingPlan, devices: int) -> list[int]:
    """The first rank of the first and of the last stage."""
    return sorted({0, devices - devices // plan.layout.pipeline})


if __name__ == "__main__":
    cli.run(PROG, main)
