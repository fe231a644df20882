"""Losses, rewards and gradients on labelled answers are those of TRL's KTOTrainer."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import tiny
from pairs import BATCH, LONGEST, kto_loss, labelled_step, write_labelled
from plain import unstacked
from qwen3_npu.parity.measure import largest_difference
from qwen3_npu.parity.rows import EP2, PER_DOCUMENT, PP2, RING, TP2, VPP
from worlds import World

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "checkpoint"))
import samples

from qwen3_npu.checkpoint.mapping.lora import Lora

FLAGS = ["--seq-length", str(LONGEST), "--global-batch-size", str(BATCH), "--lr", "1e-3", "--train-iters", "3"]
FLAGS += ["--lr-decay-style", "constant", "--clip-grad", "0", "--device", "cpu", "--eval-iters", "0"]
FLAGS += ["--split", "1,0,0", "--stage", "kto", "--beta", "0.3"]
FLAGS += ["--desirable-weight", "1.5", "--undesirable-weight", "0.7"]
LORA = Lora(4, 8.0, samples.ALL_TARGETS)
# Name -> processes, micro-batch, samples that all data-parallel ranks work on at once, model, flags.
LAYOUTS: dict[str, tuple[int, int, int, str, list[str]]] = {
    "one process, packed": (1, 8, 8, "untied", [*PER_DOCUMENT, "--no-pad-to-seq-lengths"]),
    "DP2": (2, 4, 8, "untied", []),
    "TP2": (2, 8, 8, "untied", TP2),
    "PP2 VPP2": (2, 4, 4, "untied", PP2 + VPP),
    "CP2": (2, 8, 8, "untied", RING),
    "EP2": (2, 4, 8, "moe", [*EP2, "--moe-aux-loss-coeff", "0"]),
    "LoRA": (1, 8, 8, "adapted", ["--lora-r", str(LORA.r), "--lora-alpha", str(LORA.alpha)]),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_labelled(tmp_path_factory.mktemp("labelled") / "answers")


@pytest.fixture(scope="module")
def references(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Model -> its reference, another one; an adapter's is its base."""
    root = tmp_path_factory.mktemp("references")
    made = {kind: str(tiny.write_model(root / kind, tiny.arch(kind), seed=7)) for kind in ("untied", "moe")}
    return {**made, "adapted": models["untied"]}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("adapter") / "peft"
    return str(samples.write_adapter(folder, tiny.arch("untied"), LORA, shared_a=True))


@pytest.fixture(scope="module")
def trl(
    models: dict[str, str],
    references: dict[str, str],
    adapter: str,
    data: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """(micro-batch, samples at once, model) -> TRL's loss, metrics and gradients of the first step; each once."""
    pytest.importorskip("trl", reason="TRL is the oracle: pip install trl")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("trl")

    def opened(path: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    @functools.cache
    def compute(micro: int, at_once: int, kind: str) -> dict[str, Any]:
        if kind == "adapted":  # peft merges the adapter: the same function, with gradients of other weights
            policy = PeftModel.from_pretrained(opened(models["untied"]), adapter).merge_and_unload()
        else:
            policy = opened(models[kind])
        policy.requires_grad_(True)
        frozen = opened(references[kind])
        value, metrics = kto_loss(policy, frozen, labelled_step(data), folder, micro=micro, at_once=at_once)
        value.backward()
        gradients = unstacked({n: p.grad.numpy() for n, p in policy.named_parameters() if p.grad is not None})
        return {"loss": value.item(), "metrics": metrics, "gradients": gradients}

    return compute


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_rewards_and_gradients_are_those_of_trl(
    name: str,
    worlds: dict[int, World],
    models: dict[str, str],
    references: dict[str, str],
    adapter: str,
    data: str,
    trl: Any,
    tmp_path: Path,
) -> None:
    size, micro, at_once, kind, extra = LAYOUTS[name]
    file = tmp_path / "gradients.npz"
    flags = [*FLAGS, "--data-path", data, "--micro-batch-size", str(micro), *extra]
    if kind == "adapted":
        flags += ["--load", models["untied"], "--lora-load", adapter, "--finetune"]
    else:
        flags += ["--load", models[kind], "--ref-model", references[kind]]
    got = worlds[size].run("preference", flags=flags, steps=1, file=str(file))
    expected = trl(micro, at_once, kind)
    assert got["loss"][0] == pytest.approx(expected["loss"], rel=1e-5)
    for metric, value in expected["metrics"].items():
        # Differences of log-probabilities near -100, whose last float32 digit is 8e-6; rewards are 0.3 times these. An
        # adapter is added to its linear's product in another order than the merged weight's, hence three such digits.
        last = 8e-6 if metric == "kl" else 0.3 * 8e-6 * (3 if kind == "adapted" else 1)
        assert got["metrics"][metric] == pytest.approx(value, rel=1e-5, abs=last), metric
    if kind == "untied":
        assert expected["metrics"]["kl"] > 0.1, "the term is not always clamped"
    found, wanted = dict(np.load(file)), expected["gradients"]
    if kind == "adapted":
        # W + s B A: the gradient of B is s times that of W, times A transposed.
        a, b = (f"base_model.model.model.layers.1.self_attn.o_proj.lora_{matrix}.weight" for matrix in "AB")
        weights = load_file(Path(adapter) / "adapter_model.safetensors")
        whole = wanted["model.layers.1.self_attn.o_proj.weight"]
        found = {name: found[name] for name in (a, b)}
        wanted = {a: LORA.scale * weights[b].T @ whole, b: LORA.scale * whole @ weights[a].T}
    difference, where = largest_difference(found, wanted)
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
