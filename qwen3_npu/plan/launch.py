"""The verdict on a training before its start; every launch and every dry run for an NPU computes it."""

from __future__ import annotations

import dataclasses

from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.args.rules.fit import Fit
from qwen3_npu.args.tools.plan import byte_count
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.plan.device import GIB, Device, find_device
from qwen3_npu.plan.from_args import setup_of
from qwen3_npu.plan.shape import shape_of
from qwen3_npu.plan.show.report import describe_plan
from qwen3_npu.plan.verdict import PlanVerdict, remedies

DEFAULT = "910B-64G"


def device_for(name: str, memory: str | None, table: str | None, flag: str = "--plan-device") -> Device:
    """A device of the table with the user's memory; `flag` gave its name.

    Raises:
        UsageError: unknown name, or too little memory.
    """
    device = find_device(name, table, flag)
    if memory is None:
        return device
    size = byte_count(memory, "--device-memory")
    if size <= device.reserve:
        raise UsageError(f"--device-memory {memory} is less than the runtime alone takes on {device.name}")
    return dataclasses.replace(device, memory=size)


def planned(args: PretrainArgs, arch: Qwen3Arch, sizes: Fit, *, frozen: float = 0.0) -> PlanVerdict | None:
    """The verdict; None if the device is unknown (--plan-device).

    Args:
        frozen: share of frozen weights, without LoRA.

    Raises:
        UsageError: it does not fit, and --fit error is given.
    """
    wanted, runtime = args.verdict, args.runtime
    name = wanted.plan_device or (DEFAULT if runtime.dry_run or runtime.device == "npu" else None)
    if name is None:
        return None
    shape = shape_of(arch, sizes.layout.padded_vocab_size)
    device = device_for(name, wanted.device_memory, wanted.device_table)
    targets, _ = args.lora.places(arch)
    setup = dataclasses.replace(setup_of(args, sizes), frozen=frozen, lora_targets=targets)
    verdict = PlanVerdict(shape, setup, device)
    if not verdict.fits and wanted.fit == "error":
        best = remedies(verdict, most=1)
        way_out = f"; {best[0]}" if best else ""
        raise UsageError(
            f"--fit error: {verdict.peak / GIB:.1f} GiB are needed, {verdict.limit / GIB:.1f} GiB of {device.name} are "
            f"usable{way_out}"
        )
    return verdict


def lines(verdict: PlanVerdict | None, *, dry_run: bool) -> list[str]:
    """The complete table in a dry run; else only the verdict, with remedies if it does not fit."""
    if verdict is None:
        return []
    words = describe_plan(verdict)
    start = next(number for number, line in enumerate(words) if line.startswith("plan: step"))
    return words if dry_run else words[start:]
