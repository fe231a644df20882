"""A trace as text: memory at the peak, operations, collectives, compared with the plan."""

from __future__ import annotations

import collections
import re

from qwen3_npu.plan.device import GIB, Device
from qwen3_npu.plan.memory import StageMemory
from qwen3_npu.trace.overlap import Played, communication_seconds, fused_seconds, played, seconds_of
from qwen3_npu.trace.rank import RankTrace
from qwen3_npu.trace.record import Operation

_MIB = 2**20


def describe(trace: RankTrace, planned: StageMemory, device: Device, *, passes: int, most: int) -> list[str]:
    """A table of one rank.

    Args:
        planned: memory by the closed forms for the traced kernels, without the runtime's reserve.
        passes: number of micro-batches of a step.
        most: number of lines about memory at the peak.
    """
    lines = [f"trace: rank {trace.rank}, stage {trace.stage}, {trace.micro_batches} of {passes} micro-batches"]
    for name, value, expected in (
        ("weights", trace.weights, planned.weights),
        ("gradients", trace.gradients, planned.gradients),
        ("optimizer", trace.optimizer, planned.optimizer),
        ("peak", trace.peak, planned.total - planned.start),
    ):
        lines.append(
            f"trace:   {name:<12}{value / GIB:>9.3f} GiB   planned {expected / GIB:>9.3f} GiB  {_off(value, expected)}"
        )
    lines.append("trace: held at the peak")
    held = sorted(merged(trace.holders).items(), key=lambda pair: -pair[1])
    lines += [f"trace:   {size / _MIB:>11,.1f} MiB  {label}" for label, size in held[:most]]
    if rest := sum(size for _, size in held[most:]):
        lines.append(f"trace:   {rest / _MIB:>11,.1f} MiB  {len(held) - most} more")
    lines += [*_operations(trace, device, passes), *_collectives(trace, device, passes)]
    return [*lines, *_exposed(trace, device, passes)]


def _off(value: float, expected: float) -> str:
    return "equal" if value == expected else f"{100 * (expected / value - 1):+.1f} %" if value else ""


def merged(holders: dict[str, int]) -> dict[str, int]:
    """Merge the same modules of all layers."""
    total = collections.Counter[str]()
    for label, size in holders.items():
        total[re.sub(r"layers\.\d+", "layers.*", label)] += size
    return total


def repeated(trace: RankTrace, passes: int) -> list[tuple[Operation, float]]:
    """Each operation and how often a step of `passes` micro-batches runs it."""
    factor = passes / trace.micro_batches
    return [
        (operation, factor if operation.phase in ("forward", "backward") else 1.0) for operation in trace.operations
    ]


def _operations(trace: RankTrace, device: Device, passes: int) -> list[str]:
    number, flops, seconds = collections.Counter[str](), collections.Counter[str](), collections.Counter[str]()
    for operation, times in repeated(trace, passes):
        if operation.ranks and not operation.is_fused:
            continue
        number[operation.phase] += times  # type: ignore[assignment]
        flops[operation.phase] += operation.flops * times  # type: ignore[assignment]
        seconds[operation.phase] += seconds_of(operation, device) * times  # type: ignore[assignment]
    lines = [f"trace: {'operations of a step':<22}{'number':>10}{'TFLOP':>10}{'seconds':>10}   ({device.name})"]
    for phase, count in number.items():
        lines.append(f"trace:   {phase:<20}{count:>10,.0f}{flops[phase] / 1e12:>10,.2f}{seconds[phase]:>10.3f}")
    return lines


def exchanged(trace: RankTrace, device: Device, passes: int) -> dict[tuple[str, str, int], tuple[float, float, float]]:
    """(group, operation, size) -> number, bytes, seconds during which nothing else runs."""
    table: dict[tuple[str, str, int], tuple[float, float, float]] = {}
    for operation, times in repeated(trace, passes):
        size = len(operation.ranks)
        if size < 2:
            continue
        group = trace.groups.get(operation.ranks, "pair")
        key = group, operation.name.removeprefix("c10d.").removeprefix("npu.").lstrip("_"), size
        seconds = communication_seconds(operation, device) if operation.waits else 0.0
        if operation.is_fused:
            seconds = fused_seconds(operation, device) - seconds_of(operation, device)
        before = table.get(key, (0.0, 0.0, 0.0))
        table[key] = before[0] + times, before[1] + operation.moved * times, before[2] + seconds * times
    return table


def _collectives(trace: RankTrace, device: Device, passes: int) -> list[str]:
    lines = [f"trace: {'collectives of a step':<45}{'ranks':>6}{'number':>9}{'GiB':>10}{'waits':>11}"]
    for (group, name, size), (count, moved, seconds) in sorted(exchanged(trace, device, passes).items()):
        wait = f"{seconds:.3f} s" if seconds else "-"
        lines.append(f"trace:   {group:<11}{name:<32}{size:>6}{count:>9,.0f}{moved / GIB:>10.3f}{wait:>11}")
    lines.append(f"trace: before the first step: {len(trace.start)} collectives, {trace.communicators} groups are made")
    return lines


def play(trace: RankTrace, device: Device, passes: int) -> Played:
    """The traced step on a device's streams, see `overlap.played`."""
    return played(trace.operations, trace.waits, trace.groups, device, repeats=passes / trace.micro_batches)


def _exposed(trace: RankTrace, device: Device, passes: int) -> list[str]:
    """Lines about exposed communication."""
    step = play(trace, device, passes)
    lines = [f"trace: {'played on streams (without bubble and host)':<44}{step.total:>8.3f} s"]
    for name, seconds in sorted(step.exposed.items()):
        lines.append(f"trace:   {f'nothing hides {name}':<42}{seconds:>8.3f} s{100 * seconds / step.total:>8.1f} %")
    return lines


def as_json(trace: RankTrace, planned: StageMemory, device: Device, passes: int) -> dict[str, object]:
    """The same as plain data: bytes and seconds."""
    return {
        "rank": trace.rank,
        "stage": trace.stage,
        "bytes": {"weights": trace.weights, "gradients": trace.gradients, "optimizer": trace.optimizer},
        "peak_bytes": trace.peak,
        "planned_peak_bytes": planned.total - planned.start,
        "holders": merged(trace.holders),
        "operations": sum(times for operation, times in repeated(trace, passes) if not operation.ranks),
        "collectives": [
            {"group": group, "operation": name, "ranks": size, "number": count, "bytes": moved, "seconds": seconds}
            for (group, name, size), (count, moved, seconds) in sorted(exchanged(trace, device, passes).items())
        ],
        "communicators": trace.communicators,
        "step_seconds": play(trace, device, passes).total,
        "exposed_seconds": dict(play(trace, device, passes).exposed),
    }
