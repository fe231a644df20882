"""A verdict and a search as text: aligned tables with units, and the command line of a layout."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence

from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.cli import option
from qwen3_npu.plan.candidate import LayoutCandidate
from qwen3_npu.plan.device import GIB
from qwen3_npu.plan.verdict import PlanVerdict, remedies


def describe_plan(verdict: PlanVerdict) -> list[str]:
    """Lines about memory of each stage by kind, time of a step by kind, and whether it fits."""
    lines = [*_memory_table(verdict), *_time_lines(verdict)]
    device = verdict.device
    limit = f"{verdict.limit / GIB:.1f} GiB usable of {device.memory / GIB:.1f} GiB ({device.name})"
    if verdict.fits:
        spare = verdict.limit - verdict.peak
        return [*lines, f"plan: fits: {verdict.peak / GIB:.1f} GiB of {limit}; {spare / GIB:.1f} GiB spare"]
    lines.append(f"plan: does not fit: {verdict.peak / GIB:.1f} GiB needed, {limit}")
    return [*lines, *(f"plan:   remedy: {remedy}" for remedy in remedies(verdict))]


def _memory_table(verdict: PlanVerdict) -> list[str]:
    """One column per stage; at most six, including the first and the last one."""
    stages = list(enumerate(verdict.stages))
    shown = stages if len(stages) <= 6 else [*stages[:3], *stages[-3:]]
    head = "".join(f"{f'stage {number}':>11}" for number, _ in shown)
    lines = [f"plan: {'memory [GiB]':<15}{head}"]
    for kind, _ in verdict.stages[0].rows():
        values = [getattr(stage, kind) / GIB for _, stage in shown]
        if any(value >= 0.005 for value in values):
            lines.append(f"plan:   {kind:<13}" + "".join(f"{value:11.2f}" for value in values))
    lines.append("plan:   " + f"{'total':<13}" + "".join(f"{stage.total / GIB:11.2f}" for _, stage in shown))
    return lines


def _time_lines(verdict: PlanVerdict) -> list[str]:
    time = verdict.time
    parts = [f"{kind} {100 * value / time.total:.0f} %" for kind, value in time.rows() if value >= 0.005 * time.total]
    error = verdict.device.error
    return [
        f"plan: step {time.total:.2f} s (+-{100 * error:.0f} %): {', '.join(parts)}",
        f"plan: {verdict.tokens_per_second:,.0f} tokens/s/device, MFU {100 * verdict.mfu:.0f} %",
    ]


def layout_words(verdict: PlanVerdict) -> str:
    setup = verdict.setup
    words = [f"TP{setup.tensor}", f"PP{setup.pipeline}"]
    words += [f"VPP{setup.virtual}"] if setup.virtual > 1 else []
    words += [f"CP{setup.context}"] if setup.context > 1 else []
    words += [f"EP{setup.expert} ETP{setup.expert_tensor}"] if verdict.shape.is_moe else []
    return " ".join([*words, f"DP{setup.data}"])


def table(found: Sequence[LayoutCandidate], top: int) -> list[str]:
    """The best layouts, one per line, and why the second one is slower."""
    head = f"{'layout':<34}{'MBS':>4}{'recompute':>11}{'memory':>12}{'step':>10}{'tokens/s/dev':>14}{'MFU':>7}"
    lines = [f"   {head}"]
    for number, one in enumerate(found[:top], 1):
        verdict, setup = one.verdict, one.verdict.setup
        recompute = f"{setup.recompute}/{max(map(sum, setup.layers))}" if setup.recompute else "-"
        recompute = "swap" if setup.swapped else recompute
        lines.append(
            f"{number:>2} {layout_words(verdict):<34}{one.layout.train.micro_batch_size:>4}{recompute:>11}"
            f"{verdict.peak / GIB:>8.1f} GiB{verdict.time.total:>8.2f} s{verdict.tokens_per_second:>14,.0f}"
            f"{100 * verdict.mfu:>5.0f} %"
        )
    if len(found) > 1:
        lines.append(why_behind(found[0].verdict, found[1].verdict))
    return lines


def why_behind(best: PlanVerdict, other: PlanVerdict) -> str:
    """The kind of time by which a layout loses most."""
    first = dict(best.time.rows())
    kind, lost = max(((kind, value - first[kind]) for kind, value in other.time.rows()), key=lambda pair: pair[1])
    behind = other.time.total - best.time.total
    return f"the second is {behind:.3g} s a step slower; most of it is {kind} ({lost:+.3g} s)"


def command(args: PretrainArgs, devices: int, node: int) -> str:
    """The command line of this layout, without default values."""
    each = max(size for size in range(1, min(devices, node) + 1) if devices % size == 0)
    words = ["torchrun", "--nproc-per-node", str(each)]
    if devices > each:
        words += ["--nnodes", str(devices // each), "--node-rank", "RANK", "--master-addr", "HOST"]
    words += ["pretrain_gpt.py" if args.data.stage == "pt" else "posttrain_gpt.py"]
    for group in args:
        for field in dataclasses.fields(group):
            words += _words(field, getattr(group, field.name))
    return shlex.join(words)


def _words(field: dataclasses.Field, value: object) -> list[str]:
    is_default = value == (field.default_factory() if callable(field.default_factory) else field.default)
    if is_default or field.name == "train_iters":
        return []
    name = option(field.name)
    if isinstance(value, bool):
        return [name if value else re.sub("^--", "--no-", name)]
    return [name, *(map(str, value) if isinstance(value, list) else [str(value)])]


def as_json(verdict: PlanVerdict) -> dict[str, object]:
    """A verdict as plain data: bytes and seconds."""
    return {
        "setup": dataclasses.asdict(verdict.setup),
        "device": verdict.device.name,
        "fits": verdict.fits,
        "limit_bytes": verdict.limit,
        "stages": [dict(stage.rows()) | {"total": stage.total} for stage in verdict.stages],
        "step_seconds": dict(verdict.time.rows()) | {"total": verdict.time.total},
        "tokens_per_second_per_device": verdict.tokens_per_second,
        "mfu": verdict.mfu,
    }
