"""What a training tells of steps whose update was skipped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import tiny


def test_skipped_updates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are no part of a mean loss, and metrics.jsonl is JSON to every reader."""
    from qwen3_npu.platform import select_platform
    from qwen3_npu.training.reports.report import Reporter
    from qwen3_npu.training.step import NOTHING, StepResult

    caplog.set_level("INFO", "qwen3_npu")
    sizes = {"devices": 1, "interval": 2, "first": 0, "last": 4}
    reporter = Reporter(select_platform("cpu"), tiny.arch(), **sizes, folder=tmp_path, is_main=True)
    tally = dataclasses.replace(NOTHING, loss_sum=30.0, loss_weight=10.0, tokens=10.0, real_tokens=10.0, places=10.0)
    good, bad = StepResult(tally, 1.0, 0.1), StepResult(tally, float("nan"), 0.1, skipped=True)
    for iteration, result in enumerate((good, bad, bad, bad), start=1):
        reporter.step(iteration, result)
    reporter.close()
    first, second = (line for line in caplog.messages if line.startswith("step "))
    assert "loss 3.000000 |" in first
    assert "every update skipped |" in second

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["grad_norm"] for line in lines if "grad_norm" in line] == [1.0, None, None, None]
    assert [line["step"] for line in lines if "skipped" in line] == [2, 3, 4]


def test_the_rate_with_padding_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3_npu.platform import select_platform
    from qwen3_npu.training.reports import report
    from qwen3_npu.training.step import NOTHING, StepResult

    caplog.set_level("INFO", "qwen3_npu")
    clock = [100.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: clock[0])
    sizes = {"devices": 2, "interval": 1, "first": 0, "last": 2}
    reporter = report.Reporter(select_platform("cpu"), tiny.arch(), **sizes, folder=None, is_main=True)
    tally = dataclasses.replace(NOTHING, loss_sum=9.0, loss_weight=3.0, tokens=3.0, real_tokens=1000.0, places=4000.0)
    for iteration in (1, 2):
        reporter.window.start, clock[0] = clock[0], clock[0] + 5
        reporter.step(iteration, StepResult(tally, 1.0, 0.1))
    first, second = (line for line in caplog.messages if line.startswith("step "))
    assert "| 100 tokens/s/device | (400 tokens/s/device nominal, with padding) |" in first
    assert "nominal" not in second
