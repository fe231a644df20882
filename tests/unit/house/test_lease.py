"""Leases: one process at a time writes an output; and ranks that end with their launcher."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen3_npu import lease as module
from qwen3_npu.errors import Stopped, UsageError
from qwen3_npu.lease import Lease, folder_lease
from qwen3_npu.processes import started

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import sys, time
from pathlib import Path
from qwen3_npu.lease import folder_lease
with folder_lease(Path(sys.argv[1]), "--save"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease of the folder `out`, until its input ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def elsewhere(path: Path, **changes: object) -> Path:
    """A lease of a process on another machine."""
    path.parent.mkdir(exist_ok=True)
    record = {"host": "node7", "processes": "boot7", "pid": os.getpid(), "started": "1", "since": "today", "token": "t"}
    path.write_text(json.dumps(record | changes))
    return path


def test_a_second_process_is_refused_by_name_until_the_first_ends(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    with pytest.raises(UsageError, match=rf"--save .*out is being written by process {other.pid} on .*another --save"):
        folder_lease(tmp_path / "out", "--save")
    folder_lease(tmp_path / "other", "--save").release()
    other.communicate("")
    assert list((tmp_path / "out").iterdir()) == []
    with folder_lease(tmp_path / "out", "--save"):
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lease"]


def test_what_a_killed_process_left_is_taken_over_aloud(
    tmp_path: Path, other: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from qwen3_npu import log

    log.setup()
    other.kill()
    other.wait()
    begin = time.monotonic()
    with folder_lease(tmp_path / "out", "--save"):
        assert time.monotonic() - begin < 5, "its end is seen, not waited for"
        assert f"process {other.pid}" in capsys.readouterr().out


def test_a_process_id_that_was_given_again_is_no_holder(tmp_path: Path) -> None:
    with folder_lease(tmp_path, "--save") as held:
        text = held.path.read_text()
    held.path.write_text(text.replace(str(started(os.getpid())), "1"))
    taken = folder_lease(tmp_path, "--save")
    assert str(os.getpid()) in taken.path.read_text()
    taken.release()


def test_elsewhere_signs_of_life_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is wrong does not matter: only that the time moves."""
    monkeypatch.setattr(module, "_LOOK", 0.02)
    path = elsewhere(tmp_path / "x.lease")
    os.utime(path, (0, 0))
    threading.Timer(0.2, os.utime, (path, (5, 5))).start()
    with pytest.raises(
        UsageError, match=r"^--output-prefix x is being written by process \d+ on node7 \(since today\)"
    ):
        Lease(path, "--output-prefix x", "choose another")
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    for text in (path.read_text(), "", "[" * 4000, '{"host": 1}', "\0\xff"):
        path.write_text(text)
        Lease(path, "x", "y").release()


def test_those_who_may_wait_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK", 0.02)
    first = folder_lease(tmp_path, "--data-cache-path")
    threading.Timer(0.3, first.release).start()
    begin = time.monotonic()
    with Lease(first.path, "x", "y", wait=True):
        assert time.monotonic() - begin > 0.2


def test_one_of_many_takers_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    monkeypatch.setattr(module, "_LOOK", 0.01)
    held: list[Lease] = []

    def take(path: Path) -> None:
        with contextlib.suppress(UsageError):
            held.append(Lease(path, "x", "y"))

    for number in range(10):
        path = elsewhere(tmp_path / f"{number}.lease")
        takers = [threading.Thread(target=take, args=(path,)) for _ in range(8)]
        for taker in takers:
            taker.start()
        for taker in takers:
            taker.join()
        assert len(held) == 1
        held.pop().release()


def test_a_holder_that_was_taken_for_dead_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT", 0.02)
    held = folder_lease(tmp_path, "--save")
    before = held.path.stat().st_mtime_ns
    time.sleep(0.2)
    assert held.path.stat().st_mtime_ns > before, "signs of life"
    held.path.unlink()
    held.check()  # removed by hand: it is ours again
    elsewhere(held.path)
    with pytest.raises(Stopped, match="now belongs to process"):
        held.check()
    held.release()
    assert held.path.exists(), "the other's"
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--save .*cannot be written"):
        folder_lease(tmp_path / "file", "--save")


def test_a_second_training_is_refused_on_rank_0(
    tmp_path: Path, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen3_npu.args.training import CheckpointArgs
    from qwen3_npu.training.checkpoints.saving import leased

    args = CheckpointArgs(save=str(tmp_path / "out"))
    with pytest.raises(UsageError, match=rf"--save .*out is being written by process {other.pid} .*another --save"):
        leased(args).__enter__()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with leased(args) as lease:
        assert lease is None, "rank 0 has it"


RANK = """
import os, time
from pathlib import Path
from qwen3_npu import cli

def main():
    folder = Path(os.environ["FOLDER"])
    (folder / os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(120)

cli.run("rank", main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_ranks_end_when_their_torchrun_is_killed(tmp_path: Path) -> None:
    script, folder = tmp_path / "rank.py", tmp_path / "ranks"
    folder.mkdir()
    script.write_text(textwrap.dedent(RANK))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    torchrun = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "FOLDER": str(folder), "PYTHONPATH": str(ROOT)})
    pids: list[int] = []
    try:
        end = time.monotonic() + 60
        while len(pids) < 2 and time.monotonic() < end:
            time.sleep(0.1)
            pids = [int(text) for path in folder.iterdir() if (text := path.read_text())]
        assert len(pids) == 2
        assert all(started(pid) for pid in pids)
        torchrun.kill()
        torchrun.wait()
        end = time.monotonic() + 10
        while any(started(pid) for pid in pids) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(started(pid) for pid in pids)
    finally:
        torchrun.kill()
        for pid in pids:
            if started(pid):
                os.kill(pid, signal.SIGKILL)
