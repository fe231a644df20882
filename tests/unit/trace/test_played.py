"""Programs played on streams, by hand: what waits for communication, and for how long."""

from __future__ import annotations

import dataclasses

import pytest

from qwen3_npu.plan.device import DEVICE_SPECS
from qwen3_npu.trace.overlap import Played, played
from qwen3_npu.trace.record import Operation

# A product of one FLOP takes a second, an exchange of two bytes on each of two ranks one second, without latency.
DEVICE = dataclasses.replace(
    DEVICE_SPECS["910B-64G"],
    flops=1.0,
    product=1.0,
    product_half=0.0,
    memory_bandwidth=1.0,
    streaming=1.0,
    link=1.0,
    transfer=1.0,
    latency=0.0,
    fused=0.8,
)
PAIR = (0, 1)


def product(seconds: float) -> Operation:
    return Operation("aten.mm", "forward", seconds, 0.0)


def gather(seconds: float, *, waits: bool = False) -> Operation:
    """`moved` counts the input, half of the output."""
    return Operation("c10d._allgather_base", "forward", 0.0, 3 * seconds, ranks=PAIR, waits=waits)


def play(*operations: Operation, waits: tuple[tuple[int, int], ...] = ()) -> Played:
    return played(operations, waits, {PAIR: "tp"}, DEVICE, repeats=2.0)


def test_a_collective_hides_behind_what_runs_until_it_is_waited_for() -> None:
    """A gather of 3 s; 1 s of products until it is waited for."""
    step = play(gather(3.0), product(1.0), product(5.0), waits=((2, 0),))
    assert (step.busy, step.exposed["tp"]) == pytest.approx((12.0, 4.0))


def test_pieces_travel_one_after_the_other() -> None:
    """Two pieces of 1 s each, launched together; the product of the first, 0.5 s, hides half of the second."""
    step = play(gather(1.0), gather(1.0), product(0.5), product(0.5), waits=((2, 0), (3, 1)))
    assert step.exposed["tp"] == pytest.approx(2 * (1.0 + 0.5))


def test_waits_are_for_the_collective_that_the_program_names() -> None:
    """The one launched first is waited for last."""
    step = play(gather(1.0), gather(1.0), product(0.0), product(4.0), waits=((3, 1), (4, 0)))
    assert step.exposed["tp"] == pytest.approx(2 * 2.0)


def test_a_collective_that_is_waited_for_at_once_hides_nothing() -> None:
    assert play(product(5.0), gather(2.0, waits=True), product(5.0)).exposed["tp"] == pytest.approx(4.0)


@pytest.mark.parametrize(("exchange", "seconds"), [(2.0, 2.0 / 0.8), (0.5, 1.0 / 0.8)])
def test_a_fused_product_takes_the_longer_of_both_over_the_devices_share(exchange: float, seconds: float) -> None:
    fused = Operation("npu.npu_all_gather_base_mm", "forward", 1.0, 3 * exchange, ranks=PAIR)
    step = play(fused, product(1.0))
    assert (step.busy, step.exposed["tp"]) == pytest.approx((4.0, 2 * (seconds - 1.0)))
