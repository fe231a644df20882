"""--profile: which steps and ranks are recorded, and that a recording is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from qwen3_npu.args.profile import ProfileArgs
from qwen3_npu.errors import UsageError
from qwen3_npu.platform import select_platform
from qwen3_npu.training.reports.profiling import Profiling


class Recorder:
    """A profiler that notes when it runs."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self) -> None:
        self.said.append("start")

    def stop(self) -> None:
        self.said.append("stop")


def record(args: ProfileArgs, rank: int, steps: int) -> list[object]:
    recorder = Recorder()
    platform = dataclasses.replace(select_platform("cpu"), profiler=lambda args: recorder)
    profiling = Profiling(platform, args, rank, first=1, last=steps)
    for iteration in range(1, steps + 1):
        profiling.before(iteration)
        recorder.said.append(iteration)
        profiling.after(iteration, last=iteration == steps)
    return recorder.said


def test_steps_and_ranks() -> None:
    args = ProfileArgs(profile=True, profile_step_start=2, profile_step_end=4)
    assert record(args, 0, 6) == [1, 2, "start", 3, 4, "stop", 5, 6]
    assert record(args, 0, 3) == [1, 2, "start", 3, "stop"], "the end of the training ends it"
    assert record(args, 1, 6) == [1, 2, 3, 4, 5, 6]
    assert "start" in record(dataclasses.replace(args, profile_ranks=[-1]), 1, 6)
    assert "start" not in record(dataclasses.replace(args, profile=False), 0, 6)


def test_steps_that_do_not_come_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "qwen3_npu")
    assert record(ProfileArgs(profile=True), 0, 11)[10] == "start"
    assert "warning" not in caplog.text
    assert record(ProfileArgs(profile=True), 0, 10) == list(range(1, 11))
    assert "no step is profiled: --profile-step-start 10 comes before step 11, and the steps of this" in caplog.text


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(UsageError, match="--profile-step-end 3 must be above --profile-step-start 3"):
        ProfileArgs(profile=True, profile_step_start=3, profile_step_end=3)


def test_a_recording_is_written(tmp_path: Path) -> None:
    args = ProfileArgs(profile=True, profile_step_start=0, profile_step_end=1, profile_save_path=str(tmp_path))
    profiling = Profiling(select_platform("cpu"), args, 0, first=1, last=3)
    profiling.before(1)
    torch.ones(8) @ torch.ones(8)
    profiling.after(1, last=False)
    (trace,) = tmp_path.glob("*.json")
    assert "aten::dot" in trace.read_text()
