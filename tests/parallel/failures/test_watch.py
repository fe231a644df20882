"""A training under torchrun whose rank is stopped: the verdict, and the end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from failures.test_kills import launch, losses, workers
from test_resume import BASE

from qwen3_npu.parity.rows import TP2
from worlds import World


def test_a_stopped_rank_is_named_and_the_job_ends(
    worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    save, output = tmp_path / "save", tmp_path / "output"
    flags = [*BASE, *TP2, "--train-iters", "100000", "--data-path", tokens, "--load", models["tied"]]
    unwatched = worlds[2].run("train", flags=flags, steps=2)["loss"]
    flags += ["--tensorboard-dir", str(tmp_path)]
    flags += ["--save", str(save), "--save-interval", "2", "--save-total-limit", "1", "--hang-timeout", "2"]
    process = launch(2, 0, flags, output)
    try:
        end = time.monotonic() + 60
        while not (save / "latest_checkpointed_iteration.txt").is_file() and time.monotonic() < end:
            time.sleep(0.05)
        stopped = workers(process)[1]
        # Saving has its allowance: stop it in a step.
        for _ in range(3):
            os.kill(stopped, signal.SIGCONT)
            time.sleep(0.1)
            os.kill(stopped, signal.SIGSTOP)
            time.sleep(0.5)
            if "no progress" in output.read_text():
                break
        status = process.wait(timeout=60)
    finally:
        if process.poll() is None:
            for pid in [*workers(process), process.pid]:
                os.kill(pid, signal.SIGKILL)
            process.wait()
    text = output.read_text()
    assert status == 1, text[-3000:]
    verdict = "does not run: it is stopped (SIGSTOP or a debugger)"
    assert text.count("warning: no progress for") == 1, text[-3000:]
    assert verdict in text
    assert verdict in text[text.index("Root Cause") :], "torchrun shows it last"
    folder = next((save / "logs").glob("hang_step_*"))
    assert "in wait" in (folder / "rank_0.txt").read_text() + (folder / "rank_1.txt").read_text()
    assert [loss for _, loss in losses(tmp_path)[:2]] == unwatched, "bit for bit"
