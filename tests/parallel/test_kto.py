"""Losses, rewards and gradients on labelled answers are those of TRL's KTOTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from pairs import BATCH, LONGEST, kto_loss, labelled_step, write_labelled
from plain import unstacked
from qwen3_npu.parity.measure import largest_difference
from qwen3_npu.parity.rows import PER_DOCUMENT, PP2, RING, TP2
from worlds import World

FLAGS = ["--seq-length", str(LONGEST), "--global-batch-size", str(BATCH), "--lr", "1e-3", "--train-iters", "3"]
FLAGS += ["--lr-decay-style", "constant", "--clip-grad", "0", "--device", "cpu", "--eval-iters", "0"]
FLAGS += ["--split", "1,0,0", "--stage", "kto", "--beta", "0.3"]
FLAGS += ["--desirable-weight", "1.5", "--undesirable-weight", "0.7"]
# Name -> processes, micro-batch, samples that all data-parallel ranks work on at once, flags.
LAYOUTS: dict[str, tuple[int, int, int, list[str]]] = {
    "one process, packed": (1, 8, 8, [*PER_DOCUMENT, "--no-pad-to-seq-lengths"]),
    "DP2": (2, 4, 8, []),
    "TP2": (2, 8, 8, TP2),
    "PP2": (2, 4, 4, PP2),
    "CP2": (2, 8, 8, RING),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_labelled(tmp_path_factory.mktemp("labelled") / "answers")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.write_model(tmp_path_factory.mktemp("reference") / "m", tiny.arch("untied"), seed=7))


@pytest.fixture(scope="module")
def trl(models: dict[str, str], reference: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(micro-batch, samples at once) -> TRL's loss, metrics and gradients of the first step; each once."""
    pytest.importorskip("trl", reason="TRL is the oracle: pip install trl")
    from transformers import AutoModelForCausalLM

    known: dict[tuple[int, int], dict[str, Any]] = {}
    folder = tmp_path_factory.mktemp("trl")

    def compute(micro: int, at_once: int) -> dict[str, Any]:
        if (micro, at_once) not in known:
            policy, frozen = (
                AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
                for path in (models["untied"], reference)
            )
            value, metrics = kto_loss(policy, frozen, labelled_step(data), folder, micro=micro, at_once=at_once)
            value.backward()
            gradients = unstacked({n: p.grad.numpy() for n, p in policy.named_parameters() if p.grad is not None})
            known[micro, at_once] = {"loss": value.item(), "metrics": metrics, "gradients": gradients}
        return known[micro, at_once]

    return compute


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_rewards_and_gradients_are_those_of_trl(
    name: str, worlds: dict[int, World], models: dict[str, str], reference: str, data: str, trl: Any, tmp_path: Path
) -> None:
    size, micro, at_once, extra = LAYOUTS[name]
    file = tmp_path / "gradients.npz"
    flags = [*FLAGS, "--load", models["untied"], "--ref-model", reference, "--data-path", data]
    flags += ["--micro-batch-size", str(micro), *extra]
    got = worlds[size].run("preference", flags=flags, steps=1, file=str(file))
    expected = trl(micro, at_once)
    assert expected["metrics"]["kl"] > 0.1, "the term is not always clamped"
    assert got["loss"][0] == pytest.approx(expected["loss"], rel=1e-5)
    for metric, value in expected["metrics"].items():
        # Rewards are 0.3 times a difference of log-probabilities near -100, whose last float32 digit is 8e-6.
        assert got["metrics"][metric] == pytest.approx(value, rel=1e-5, abs=2.5e-6), metric
    difference, where = largest_difference(dict(np.load(file)), expected["gradients"])
    assert difference <= 1e-5, where


def test_with_lora_the_reference_is_the_base_and_it_learns(
    worlds: dict[int, World], models: dict[str, str], tmp_path: Path
) -> None:
    """At the first step policy and reference agree: every loss is its weight times a half. Then rewards part."""
    data = write_labelled(tmp_path / "answers", count=BATCH)  # every step sees the same
    flags = [*FLAGS, "--load", models["untied"], "--data-path", data, "--micro-batch-size", "8"]
    flags += ["--lora-r", "4", "--lr", "5e-3"]
    got = worlds[1].run("preference", flags=flags, steps=3, file=str(tmp_path / "g.npz"))
    good = sum(label for *_, label in labelled_step(data))
    assert got["loss"][0] == pytest.approx((1.5 * good + 0.7 * (BATCH - good)) / BATCH / 2, abs=1e-6)
    assert got["loss"][2] < got["loss"][0] - 1e-3
