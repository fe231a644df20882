"""Disks that are full and consoles that are closed do not end a training."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.summary.writer import record_writer

from qwen3_npu import log
from qwen3_npu.args.profile import ProfileArgs
from qwen3_npu.args.trackers import TrackerArgs
from qwen3_npu.errors import UsageError
from qwen3_npu.platform import select_platform
from qwen3_npu.training.reports.profiling import Profiling
from qwen3_npu.training.reports.records import Records
from qwen3_npu.training.reports.trackers import Tracked, finite, open_trackers

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def said() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log.setup()
    log.LOGGER.handlers[:] = [handler]
    yield lines
    log.setup()


def write(records: Records, steps: int) -> None:
    for step in range(steps):
        records.line(step, {"loss": 1.0})
        records.events(lambda writer: writer.add_scalar("loss", 1.0, 0))
    records.close()


def test_a_full_disk_is_told_once_and_counted(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    write(Records(tmp_path, 0), 30)
    assert len(said) == 2
    assert "metrics.jsonl cannot be written (No space left on device)" in said[0]
    assert "metrics.jsonl: 30 records were not written" in said[1]


def test_tensorboard_that_fails_leaves_the_rest(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its thread fails, after the queue took the event: neither a traceback nor a wait for a dead thread."""
    records = Records(tmp_path, 0)

    def full(self: object, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(record_writer.RecordWriter, "write", full)
    write(records, 300)
    assert "tensorboard cannot be written (No space left on device)" in said[0]
    assert "tensorboard: " in said[1]
    assert len(said) == 2
    assert "Traceback" not in capfd.readouterr().err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 300


def test_a_line_that_was_cut_is_taken_back(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records(tmp_path, 0)
    records.line(1, {"loss": 1.0})
    whole = os.write
    monkeypatch.setattr(os, "write", lambda file, data: whole(file, data[:5]))
    records.line(2, {"loss": 2.0})
    monkeypatch.setattr(os, "write", whole)
    records.line(3, {"loss": 3.0})
    records.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3]
    assert len(said) == 2


@pytest.mark.parametrize("closed", ["stdout", "both", "full"])
def test_a_closed_console_does_not_end_a_program(closed: str) -> None:
    """As in `pretrain_gpt.py ... | head -1`: what is written after the reader has gone is lost, the status stays."""
    body = (
        "from qwen3_npu import cli, log\nlog.setup()\n"
        "def main():\n    for n in range(1000): log.info('x' * 1000)\n    raise cli.UsageError('told')\n"
        "cli.run('p', main)"
    )
    if closed == "full":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        read, out = os.pipe()
        os.close(read)
    err = subprocess.PIPE if closed == "stdout" else out
    done = subprocess.run([sys.executable, "-c", body], stdout=out, stderr=err, timeout=60, check=False)
    os.close(out)
    assert done.returncode == 2
    if closed == "stdout":
        assert [line.split(" (")[0] for line in done.stderr.decode().splitlines()] == [
            "warning: standard output cannot be written",
            "p: error: told",
        ]


@pytest.mark.parametrize("status", [0, 3])
@pytest.mark.parametrize("place", ["full", "no folder"])
def test_a_log_that_cannot_be_written_leaves_the_status_of_a_script(place: str, status: int, tmp_path: Path) -> None:
    """As with tee's own status, or under `set -e`, it would not."""
    if place == "full":
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / "tune_node0.log").symlink_to("/dev/full")
    else:
        (tmp_path / "logs").write_text("")
    body = f"source {ROOT}/examples/common.sh; with_log sh -c 'echo trained; exit {status}'"
    command = ["bash", "-c", body, "tune.sh"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, "trained" in done.stdout.splitlines()) == (status, True), done.stderr


def test_a_recording_that_cannot_be_written_is_told(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:

    class Full:
        start = staticmethod(lambda: None)

        @staticmethod
        def stop() -> None:
            raise RuntimeError("Can't create directory: /full")

    args = ProfileArgs(profile=True, profile_step_start=1, profile_step_end=2)
    platform = dataclasses.replace(select_platform("cpu"), profiler=lambda args: Full())
    profiling = Profiling(platform, args, 0, first=1, last=5)
    for iteration in range(1, 6):
        profiling.before(iteration)
        profiling.after(iteration, last=iteration == 5)
    assert said == ["--profile-save-path ./profile_dir: nothing was recorded: Can't create directory: /full"]


class Service:
    """Stands for what a service's package offers: keeps what it is given, and fails if it is told to."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.logged, self.closed = fails, list[tuple[int, dict[str, float]]](), False

    def log(self, step: int, values: dict[str, float]) -> None:
        if self.fails == "log":
            raise SystemExit("the network is gone\nand more")
        self.logged.append((step, values))

    def close(self) -> None:
        self.closed = True


def test_a_tracker_gets_every_number_in_order(said: list[str]) -> None:
    service = Service()
    tracked = Tracked("service", lambda: service)
    for step in range(50):
        tracked.log(step, finite({"loss": 1.0 / (step + 1), "nan": float("nan")}))
    tracked.close()
    assert [step for step, _ in service.logged] == list(range(50))
    assert service.logged[3] == (3, {"loss": 0.25})
    assert service.closed
    assert said == []


def test_a_tracker_that_fails_or_hangs_is_told_and_nothing_waits(said: list[str]) -> None:
    failing = Tracked("service", lambda: Service("log"))
    failing.log(0, {})
    failing.thread.join()
    failing.log(1, {})
    failing.close()
    assert said == [
        "service has failed (the network is gone); the training continues without",
        "service: 2 records were not sent",
    ]
    said.clear()
    stuck, release = Service(), threading.Event()

    def late() -> Service:
        release.wait()
        return stuck

    hanging = Tracked("service", late)
    hanging.log(0, {})
    hanging.close(seconds=0.05)
    assert "service is not done 0.05 s after the last step; it is not waited for" in said[0]
    release.set()


def test_trackers_are_opened_with_what_the_flags_say(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    class Run:
        def log(self, values: object, step: int) -> None:
            asked.append((step, values))

        def finish(self) -> None:
            asked.append("finish")

    def init(**options: object) -> Run:
        asked.append(options)
        return Run()

    settings = {"lr": 1.0}
    for name, args, options in (
        ("wandb", TrackerArgs(wandb_project="p", wandb_exp_name="n"), {"project": "p", "name": "n", "dir": None}),
        ("swanlab", TrackerArgs(swanlab_project="q"), {"project": "q"}),
    ):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=init))
        asked.clear()
        (tracked,) = open_trackers(args, settings)
        tracked.log(7, {"loss": 2.0})
        tracked.close()
        assert asked == [{**options, "config": settings}, (7, {"loss": 2.0}), "finish"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--mlflow-uri needs the package mlflow: pip install mlflow-skinny"):
        TrackerArgs(mlflow_uri="x").check_installed()
