"""Ranks are killed at random moments; torchrun starts the job again, which goes on with the losses of a whole run.

KILLS=20 in the environment: so many kills of each job. A normal run kills one job once, while a checkpoint is written.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_resume import BASE

from qwen3_npu.parity.rows import TP2
from worlds import World, free_port

ROOT = Path(__file__).resolve().parents[3]
# The moments, one after the other: while files are being made, between two checkpoints, at any time.
MOMENTS = ("saving", "between", "any")
JOBS = {"torch_dist, async": ("saving", ["--ckpt-format", "torch_dist", "--async-save", "--save-total-limit", "3"])}
if "KILLS" in os.environ:
    JOBS["torch"] = ("saving", [])


def launch(processes: int, restarts: int, flags: list[str], output: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.05", "--master-port", str(free_port())]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(ROOT / "pretrain_gpt.py"), *flags],
        cwd=ROOT,
        env=env,
        stdout=output.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def workers(launcher: subprocess.Popen) -> list[int]:
    """Process ids of the training processes of a torchrun; none if it has ended."""
    try:
        return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of every step of every start."""
    text = (folder / "metrics.jsonl").read_text() if (folder / "metrics.jsonl").is_file() else ""
    # A line that was being written by a killed rank has no end.
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("}\n")]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def moment_has_come(kind: str, save: Path, first: int) -> bool:
    """Whether to kill now: `first` is the first step whose checkpoint may be hit."""
    if kind == "saving":
        started = any(int(path.name[5:12]) >= first for path in save.glob("iter_*.partial"))
        if started:
            time.sleep(random.uniform(0, 0.02))
        return started
    tracker = save / "latest_checkpointed_iteration.txt"
    reached = tracker.is_file() and int(tracker.read_text()) >= first
    if reached:
        time.sleep(random.uniform(0, 0.3 if kind == "any" else 0.02))
    return reached


@pytest.mark.parametrize("job", JOBS)
def test_killed_jobs_go_on(
    job: str, worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    first_moment, extra = JOBS[job]
    kills = int(os.environ.get("KILLS", "1"))
    steps, save, tensorboard = 6 + 4 * kills, tmp_path / "save", tmp_path / "tensorboard"
    flags = [*BASE, *TP2, "--train-iters", str(steps), "--data-path", tokens, "--load", models["tied"]]
    whole = worlds[2].run("train", flags=flags, steps=steps)["loss"]

    run = [*flags, "--save", str(save), "--save-interval", "1", "--tensorboard-dir", str(tensorboard), *extra]
    output = tmp_path / "output"
    process = launch(2, kills, run, output)
    seed = int.from_bytes(os.urandom(4), "little")
    random.seed(seed)
    done, killed, deadline = 0, set(), time.monotonic() + 150 + 60 * kills  # a wait for ever is what fails
    try:
        while process.poll() is None and time.monotonic() < deadline:
            at = MOMENTS.index(first_moment) + done
            first = 2 + 4 * done  # so that each start has a checkpoint to make, and one to fall back to
            alive = [pid for pid in workers(process) if pid not in killed] if done < kills else []
            if len(alive) == 2 and moment_has_come(MOMENTS[at % len(MOMENTS)], save, first):
                os.kill(random.choice(alive), signal.SIGKILL)
                killed.update(alive)
                done += 1
            time.sleep(0.001 if done < kills else 0.1)
    finally:
        if process.poll() is None:
            for pid in [*workers(process), process.pid]:  # each worker is a session of its own
                os.kill(pid, signal.SIGKILL)
        process.wait()
    text = output.read_text()
    assert process.returncode == 0, f"seed {seed}:\n{text[-6000:]}"
    assert done == kills, f"seed {seed}: {done} kills:\n{text[-3000:]}"
    assert text.count("resumed: ") == kills, f"seed {seed}:\n{text[-3000:]}"
    said = losses(tensorboard)
    assert {step for step, _ in said} == set(range(1, steps + 1))
    for step, loss in said:
        assert loss == whole[step - 1], f"seed {seed}: step {step}"
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(steps)
    assert not list(save.glob("*.removed"))
    if "--save-total-limit" in extra:
        assert len(list(save.glob("iter_???????"))) == 3
