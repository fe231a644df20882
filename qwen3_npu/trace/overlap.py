"""Exposed communication: the recorded program of a step, played on a device's streams.

The compute stream runs operations one after the other. Each group of ranks has its own stream. A collective starts when
its stream is free and all earlier operations have run; the compute stream continues until the program waits for the
collective. An operation that multiplies and communicates at once takes the longer of the two, divided by the device's
efficiency for such operations; its time beyond the product is exposed. Costs are those of `plan.device`.
Not modelled: the pipeline bubble, the host, and streams that slow each other.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from qwen3_npu.plan.device import Device
from qwen3_npu.plan.hiding.costs import collective_seconds, exchange_seconds, product_seconds
from qwen3_npu.trace.record import Operation

PAIRWISE = ("c10d.send", "c10d.recv")
_IN_A_STEP = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Played:
    """Seconds of a step.

    Attributes:
        busy: seconds in which the compute stream computes.
        exposed: group -> seconds in which the compute stream waits for its collectives.
    """

    busy: float
    exposed: Mapping[str, float]

    @property
    def total(self) -> float:
        return self.busy + sum(self.exposed.values())


def seconds_of(operation: Operation, device: Device) -> float:
    """Time by the plan's table of the device: products and attention by FLOP, everything else by bytes."""
    if operation.flops:
        if "attention" in operation.name:
            return operation.flops / (device.flops * device.attention)
        return product_seconds(device, operation.flops)
    return operation.moved / (device.memory_bandwidth * device.streaming)


def communication_seconds(operation: Operation, device: Device) -> float:
    """Time of a collective, of a send or receive, or of a fused product's exchange. `moved`: input and output bytes."""
    size, stride, moved = len(operation.ranks), operation.ranks[1] - operation.ranks[0], operation.moved
    if operation.name in PAIRWISE:
        inside = size * stride <= device.domain
        bandwidth, latency = device.bandwidth(2, inside), device.latency if inside else device.network_latency
        return latency + moved / (bandwidth * device.transfer)
    if "alltoall" in operation.name:
        return exchange_seconds(device, size, stride, moved / 2, steps=1)
    if "allreduce" in operation.name:
        moved *= 2  # a scatter and a gather
    elif any(kind in operation.name for kind in ("allgather", "all_gather", "reduce_scatter")):
        moved *= size / (size + 1)
    return collective_seconds(device, size, stride, moved)


def fused_seconds(operation: Operation, device: Device) -> float:
    """Time of a product that communicates at once."""
    return max(product_seconds(device, operation.flops), communication_seconds(operation, device)) / device.fused


def played(
    operations: Sequence[Operation],
    waits: Sequence[tuple[int, int]],
    groups: Mapping[tuple[int, ...], str],
    device: Device,
    *,
    repeats: float,
) -> Played:
    """Play a program.

    Args:
        waits: (operations launched before the wait, the collective that is waited for).
        groups: names of groups.
        repeats: how often a step runs the recorded forward and backward passes.
    """
    now, busy, exposed = 0.0, 0.0, collections.Counter[str]()
    free: dict[tuple[int, ...], float] = {}
    ends: dict[int, float] = {}
    pending = collections.deque(waits)
    for number, operation in enumerate(operations):
        times = repeats if operation.phase in _IN_A_STEP else 1.0
        while pending and pending[0][0] <= number:
            awaited = pending.popleft()[1]
            idle = max(0.0, ends.get(awaited, 0.0) - now)
            exposed[_name(operations[awaited], groups)] += idle * times  # type: ignore[assignment]
            now += idle
        if len(operation.ranks) < 2:
            seconds = 0.0 if operation.ranks else seconds_of(operation, device)
            now, busy = now + seconds, busy + seconds * times
            continue
        seconds = fused_seconds(operation, device) if operation.is_fused else communication_seconds(operation, device)
        ends[number] = free[operation.ranks] = max(now, free.get(operation.ranks, 0.0)) + seconds
        if operation.is_fused:
            product = product_seconds(device, operation.flops)
            now, busy = now + product, busy + product * times
        if operation.waits:
            idle = ends[number] - now
            exposed[_name(operation, groups)] += idle * times  # type: ignore[assignment]
            now += idle
    return Played(busy, dict(exposed))


def _name(operation: Operation, groups: Mapping[tuple[int, ...], str]) -> str:
    return "pp" if operation.name in PAIRWISE else groups.get(operation.ranks, "pair")
