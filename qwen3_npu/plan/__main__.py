"""Find the fastest layout that fits, before anything is launched.

python -m qwen3_npu.plan --model qwen3-32b --devices 16 --device 910B-64G --seq-length 32768 --global-batch-size 64
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from qwen3_npu import cli
from qwen3_npu.args.tools.plan import PlanArgs
from qwen3_npu.args.tools.trace import TraceArgs
from qwen3_npu.cli import option
from qwen3_npu.model.arch import Qwen3Arch, from_hf_config, read_hf_config
from qwen3_npu.model.sizes import SIZES
from qwen3_npu.plan.device import Device, learn
from qwen3_npu.plan.launch import device_for
from qwen3_npu.plan.requests import find_layouts, request_table
from qwen3_npu.plan.search import search
from qwen3_npu.plan.shape import Shape, arch_of, read_shape, shape_of
from qwen3_npu.plan.show.picture import plot
from qwen3_npu.plan.show.report import as_json, command, describe_plan, table

PROG = "python -m qwen3_npu.plan"


def main() -> None:
    if "--trace" in sys.argv and not _is_search(sys.argv[1:]):
        from qwen3_npu.trace.__main__ import trace_flags  # needs torch

        trace_flags([word for word in sys.argv[1:] if word != "--trace"])
        return
    groups = (PlanArgs, TraceArgs) if "--trace" in sys.argv else (PlanArgs,)
    args, *wanted = cli.parse(PROG, str(__doc__).split("\n\n")[0], groups, {}).groups
    if args.learn is not None:
        print("\n".join(learn(Path(args.learn), Path(args.output))))
        return
    shape, arch = _model(args)
    device = device_for(args.device, args.device_memory, args.device_table, "--device")
    if args.inference:
        _plan_requests(args, shape, arch, device)
        return
    found = search(shape, arch, args, device)
    if not args.json:
        batch = f"{args.global_batch_size} samples of {args.seq_length} tokens"
        print(f"{len(found)} layouts of {args.devices} x {device.name} fit; {batch} a step")
        print("\n".join(table(found, args.top)))
        print("\n".join(["", "the first:", *describe_plan(found[0].verdict)]))
        print(f"\n{command(found[0].args, args.devices, device.node)}", flush=True)
    layouts = [as_json(one.verdict) for one in found[: args.top]]
    if args.plot is not None:
        plot(found[0].verdict, Path(args.plot))
        if not args.json:
            print(f"picture: {args.plot}")
    if args.trace:
        from qwen3_npu.trace.__main__ import trace

        traces = trace(found[0].args, device, wanted[0])
        if args.json:
            print(json.dumps({"layouts": layouts, "traces": traces}, indent=1))
    elif args.json:
        print(json.dumps(layouts, indent=1))


def _is_search(words: list[str]) -> bool:
    """Whether all flags belong to this command; else they are flags of a training, which define the layout."""
    own = {option(field.name) for group in (PlanArgs, TraceArgs) for field in dataclasses.fields(group)}
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    return flags <= {*own, *(f"--no-{name[2:]}" for name in own), "--help"}


def _plan_requests(args: PlanArgs, shape: Shape, arch: Qwen3Arch, device: Device) -> None:
    found = find_layouts(shape, arch, device, devices=args.devices, length=args.seq_length)
    if args.json:
        print(json.dumps([dataclasses.asdict(memory) for memory in found[: args.top]], indent=1))
        return
    print(f"{args.devices} x {device.name}, requests of up to {args.seq_length:,} tokens (prompt and answer together)")
    print("\n".join(request_table(found, args.top)))


def _model(args: PlanArgs) -> tuple[Shape, Qwen3Arch]:
    if args.shape_json is not None:
        shape = read_shape(Path(args.shape_json))
        return shape, arch_of(shape)
    arch = SIZES[args.model] if args.model else from_hf_config(read_hf_config(str(args.hf_dir)), str(args.hf_dir))
    arch = arch.as_reward() if args.stage == "rm" else arch
    return shape_of(arch), arch


if __name__ == "__main__":
    cli.run(PROG, main)
