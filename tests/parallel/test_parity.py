"""The first losses of fixed trainings, committed: a refactor changes no number. And the certificate as users run it.

After a change that is meant to change them: `QWEN3_NPU_WRITE_GOLDEN=1 bash tests/run.sh tests/parallel/test_parity.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from worlds import World

ROOT = Path(__file__).resolve().parents[2]


def test_a_breach_is_named_and_fails() -> None:
    """Rounding makes rows of TP differ by more than a millionth, rows of PP by less."""
    command = [sys.executable, "-m", "qwen3_npu.parity", "--device", "cpu", "--processes", "2"]
    command += ["--rows", "^untied: (PP2|TP2 SP|TP2 PP2)$", "--tolerance", "1e-6"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    lines = {line.split(" loss ")[0].strip(): line for line in done.stdout.splitlines() if " loss " in line}
    assert lines["untied: PP2"].endswith("ok"), done.stdout + done.stderr
    assert "BREACH in model.layers" in lines["untied: TP2 SP"]
    assert "1 rows left out" in done.stdout
    assert "1 of 2 rows differ" in done.stderr
    assert done.returncode == 1


def test_rows_that_do_not_exist() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qwen3_npu.parity", "--rows", "nothing"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--list-rows" in done.stderr


GOLDEN = ROOT / "tests" / "golden"
FLAGS = ["--seq-length", "32", "--global-batch-size", "4", "--micro-batch-size", "2", "--lr", "1e-3", "--device", "cpu"]
FLAGS += ["--train-iters", "20", "--lr-decay-style", "cosine", "--lr-warmup-iters", "2", "--eval-iters", "0"]


@pytest.mark.parametrize("kind", ["untied", "tied", "moe"])
def test_losses_are_as_committed(kind: str, worlds: dict[int, World], models: dict[str, str], tokens: str) -> None:
    flags = [*FLAGS, "--load", models[kind], "--data-path", tokens]
    losses = worlds[1].run("train", flags=flags, steps=20)["loss"]
    path = GOLDEN / f"losses_{kind}.txt"
    if os.environ.get("QWEN3_NPU_WRITE_GOLDEN"):
        path.write_text("".join(f"{loss!r}\n" for loss in losses))
    # Not exact: another processor's vector units round sums differently.
    assert losses == pytest.approx([float(line) for line in path.read_text().split()], rel=2e-6)
