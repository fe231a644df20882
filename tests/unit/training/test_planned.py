"""The plan beside what a training measures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from qwen3_npu.plan.device import DEVICE_SPECS, GIB, learn
from qwen3_npu.plan.setup import Setup
from qwen3_npu.plan.shape import shape_of
from qwen3_npu.plan.verdict import PlanVerdict

STEP = 5.0  # seconds


@pytest.fixture
def verdict() -> PlanVerdict:
    setup = Setup(layers=((4,),), seq_length=64, num_microbatches=2)
    return PlanVerdict(shape_of(tiny.arch()), setup, DEVICE_SPECS["910B-64G"])


class Machine:
    """A clock that goes on by hand, a device whose waits are counted."""

    now, waits = 100.0, 0

    def synchronize(self) -> None:
        self.waits += 1


def run(
    folder: Path,
    verdict: PlanVerdict,
    monkeypatch: pytest.MonkeyPatch,
    *,
    steps: int,
    interval: int = 100,
    share: float = 1,
    ledger: dict[str, Any] | None = None,
) -> Machine:
    """The reporter over steps that take `STEP` seconds, the first ten times that; an evaluation in between."""
    from qwen3_npu.platform import select_platform
    from qwen3_npu.training.reports import report
    from qwen3_npu.training.step import NOTHING, StepResult

    machine = Machine()
    monkeypatch.setattr("time.perf_counter", lambda: machine.now)
    platform = dataclasses.replace(
        select_platform("cpu"), synchronize=machine.synchronize, memory_peak=lambda: 3 * GIB, peak_flops=lambda: None
    )
    sizes: dict[str, Any] = {"devices": 1, "interval": interval, "first": 0, "last": 1000, "is_main": True}
    reporter = report.Reporter(platform, tiny.arch(), **sizes, folder=folder, verdict=verdict)
    tally = dataclasses.replace(NOTHING, loss_sum=1, loss_weight=1, tokens=9, real_tokens=9, places=128 * share)
    for iteration in range(1, steps + 1):
        machine.now += STEP * (10 if iteration == 1 else 1)
        reporter.step(iteration, StepResult(tally, 1.0, 0.1))
        if iteration == 2:
            before = machine.waits
            with reporter.paused():
                machine.now += 1000
            machine.waits = before
    if ledger is not None:
        reporter.ledger(steps, ledger)
    reporter.close()
    return machine


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "planned_step_seconds" in line]


def test_after_three_steps_plan_and_measure_are_side_by_side(
    tmp_path: Path, verdict: PlanVerdict, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "qwen3_npu")
    machine = run(tmp_path, verdict, monkeypatch, steps=3)
    assert machine.waits == 2, "the first step, which warms up, and the third"
    (row,) = rows(tmp_path)
    stage = verdict.stages[0]
    planned = stage.total - stage.reserve
    assert row == {
        "step": 3,
        "device": "910B-64G",
        "layout": "TP1 PP1 DP1",
        "planned_step_seconds": pytest.approx(verdict.time.total),
        "measured_step_seconds": pytest.approx(STEP),
        "planned_bytes": pytest.approx(planned),
        "measured_bytes": 3 * GIB,
    }
    (line,) = (line for line in caplog.messages if line.startswith("planned "))
    assert f"planned {planned / GIB:.1f} GiB, measured 3.0 (+" in line
    assert f"s/step, measured 5 (+{100 * (STEP / verdict.time.total - 1):.0f} %)" in line
    assert "plan --learn" in line, "far off: how to make the next plan better"


def test_the_end_tells_the_mean_of_the_whole_run(
    tmp_path: Path, verdict: PlanVerdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, verdict, monkeypatch, steps=6, interval=3)
    assert [row["step"] for row in rows(tmp_path)] == [3, 6]


def test_fewer_tokens_than_planned_are_named_as_the_cause(
    tmp_path: Path, verdict: PlanVerdict, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "qwen3_npu")
    run(tmp_path, verdict, monkeypatch, steps=3, share=0.25)
    (line,) = (line for line in caplog.messages if line.startswith("planned "))
    assert line.endswith("; a step had 25 % of the tokens planned")


def test_a_run_teaches_the_next_plan(tmp_path: Path, verdict: PlanVerdict, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, verdict, monkeypatch, steps=3)
    assert "measured 5.00 s" in learn(tmp_path, tmp_path / "table.json")[0]
    assert json.loads((tmp_path / "table.json").read_text())["learnt_from"] == "TP1 PP1 DP1"


def test_without_a_verdict_nothing_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = run(tmp_path, None, monkeypatch, steps=5)  # type: ignore[arg-type]
    assert machine.waits == 0
    assert rows(tmp_path) == []


def test_a_step_slower_than_planned_is_explained_by_the_ledger(
    tmp_path: Path, verdict: PlanVerdict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qwen3_npu import log

    log.setup()
    kinds = {"data": 2 / 3 * STEP, "forward": 1 / 3 * STEP}
    record: dict[str, Any] = {"steps": 5, "seconds": STEP, "ranks": 1, "work": [STEP], "host": {}, "mean": kinds}
    record["most"] = {kind: [seconds, 0] for kind, seconds in kinds.items()}
    run(tmp_path, verdict, monkeypatch, steps=5, interval=5, ledger=record)
    third, last = (line for line in capsys.readouterr().out.splitlines() if line.startswith("planned"))
    assert "why slow" not in third
    assert "why slow: 67 % of the time" in last
