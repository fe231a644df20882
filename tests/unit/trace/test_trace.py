"""A trace against reality: real tensors on the CPU hold what tensors without data say; and against the closed forms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trace_cases import PRETENDED, REAL

STATIC = ("weights", "gradients", "optimizer")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def traces() -> dict[str, dict[str, Any]]:
    """Of all cases; one process, which needs a process group of its own."""
    command = [sys.executable, str(Path(__file__).with_name("trace_cases.py"))]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", REAL)
def test_a_trace_holds_what_a_real_step_holds(case: str, traces: dict[str, dict[str, Any]]) -> None:
    """Static bytes, and the peak but for numbers of the host, which a trace reads one by one."""
    traced, real = traces[case]["traced"], traces[case]["real"]
    assert traced["peak"] == pytest.approx(real["peak"], abs=128)
    assert traced["operations"] == pytest.approx(real["operations"], abs=4)
    assert {name: traced[name] for name in STATIC} == {name: real[name] for name in STATIC}


@pytest.mark.parametrize("case", [*REAL, *PRETENDED, "swapped"])
def test_closed_forms_are_what_a_trace_holds(case: str, traces: dict[str, dict[str, Any]]) -> None:
    """Static bytes are equal, the peak within 2 %. EVERY=1 compares all rows of the parity matrix."""
    traced, planned = traces[case]["traced"], traces[case]["planned"]
    assert {name: traced[name] for name in STATIC} == {name: planned[name] for name in STATIC}
    for name in ("peak", "start_peak"):
        assert planned[name] == pytest.approx(traced[name], rel=0.02), name


def test_a_rank_of_a_larger_job_does_no_more(traces: dict[str, dict[str, Any]]) -> None:
    """16 times the devices: the same groups, collectives and writers, less state, hardly more bytes."""
    small, large = traces["growth"]
    for same in ("communicators", "start", "collectives", "writers"):
        assert small[same] == large[same]
    assert large["state"] < small["state"]
    assert large["moved"] <= small["moved"] * 1.01
    for kind in ("start", "save"):  # four more levels of a tree of messages, and no more
        assert large[f"{kind}_seconds"] <= small[f"{kind}_seconds"] + 1.01 * 14 * 4 * 20e-6


def test_plan_traces_the_layout_of_flags_or_the_one_that_it_found(traces: dict[str, Any]) -> None:
    """`python -m qwen3_npu.plan --trace --json`, in the process of the other cases."""
    (last,), found = traces["commands"]
    assert (last["rank"], last["stage"]) == (3, 1)
    assert found["layouts"][0]["fits"]
    (first,) = found["traces"]
    kinds = found["layouts"][0]["stages"][0]
    assert first["bytes"] == {name: kinds[name] for name in STATIC}


def test_products_hide_most_of_tensor_parallelism_and_the_plan_knows_it(traces: dict[str, dict[str, Any]]) -> None:
    """Closed forms leave the share that the played program leaves."""
    off, *on = (traces["hidden"][way] for way in ("off", "--use-ascend-coc", "--use-ascend-mc2"))
    for played, planned in on:
        assert played < 0.4 * off[0]
        assert planned / off[1] == pytest.approx(played / off[0], rel=0.15)


def test_products_hide_most_of_the_exchange_of_experts_and_the_plan_knows_it(traces: dict[str, dict[str, Any]]) -> None:
    """In four pieces, without recomputation: of what is exchanged, a sixth or so is left. Of interleaved passes of four
    micro-batches, the first forward and the last backward are alone; with both, these go in pieces."""
    ways = ("off", "--moe-alltoall-overlap-comm", "--moe-fb-overlap", "both flags of experts")
    off, *on = (traces["hidden experts"][way] for way in ways)
    for played, planned in on:
        assert played < 0.4 * off[0]
        assert planned == pytest.approx(played, rel=0.15)
    assert off[1] == pytest.approx(off[0], rel=0.15)


def test_dropped_tokens_are_not_traced(traces: dict[str, Any]) -> None:
    assert traces["refused"].startswith("--moe-expert-capacity-factor 1.5 cannot be traced")
