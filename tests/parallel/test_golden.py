"""The first losses of fixed trainings, committed: a refactor changes no number.

After a change that is meant to change them: `QWEN3_NPU_WRITE_GOLDEN=1 bash tests/run.sh tests/parallel/test_golden.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from worlds import World

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FLAGS = ["--seq-length", "32", "--global-batch-size", "4", "--micro-batch-size", "2", "--lr", "1e-3", "--device", "cpu"]
FLAGS += ["--train-iters", "20", "--lr-decay-style", "cosine", "--lr-warmup-iters", "2", "--eval-iters", "0"]


@pytest.mark.parametrize("kind", ["untied", "tied", "moe"])
def test_losses(kind: str, worlds: dict[int, World], models: dict[str, str], tokens: str) -> None:
    flags = [*FLAGS, "--load", models[kind], "--data-path", tokens]
    losses = worlds[1].run("train", flags=flags, steps=20)["loss"]
    path = GOLDEN / f"losses_{kind}.txt"
    if os.environ.get("QWEN3_NPU_WRITE_GOLDEN"):
        path.write_text("".join(f"{loss!r}\n" for loss in losses))
    # Not exact: another processor's vector units round sums differently.
    assert losses == pytest.approx([float(line) for line in path.read_text().split()], rel=2e-6)
