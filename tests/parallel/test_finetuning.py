"""Fine-tuning computes what a plain loop over transformers and torch computes, document by document, unpadded."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plain import (
    FLAGS,
    MICRO2,
    STEPS,
    VARIABLE,
    check,
    document_loss,
    documents,
    plain_loop,
)
from qwen3_npu.parity.measure import largest_difference
from qwen3_npu.parity.rows import CHUNKS, EP2, FULL, PER_DOCUMENT, PP2, RING, SP, TP2, ULYSSES, VPP, ZERO
from worlds import World


@pytest.fixture(scope="module")
def plain(models: dict[str, str], data: dict[str, str]) -> Any:
    """(kind of model, form of data) -> what the plain loop computes; each once."""
    from transformers import AutoModelForCausalLM

    known: dict[tuple[str, str], dict[str, Any]] = {}

    def compute(kind: str, form: str) -> dict[str, Any]:
        if (kind, form) not in known:
            model = AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch.float32)
            known[kind, form] = plain_loop(model, data[form])
        return known[kind, form]

    return compute


SFT = {
    "single, padded": ("untied", "single", 1, []),
    "single, dynamic lengths, micro-batches of 2": ("untied", "single", 1, VARIABLE + MICRO2),
    "single, dynamic, TP2 SP PP2": ("tied", "single", 4, VARIABLE + MICRO2 + TP2 + SP + PP2),
    "single, padded, TP2 PP2": ("untied", "single", 4, TP2 + PP2),
    "single, dynamic, PP2 VPP2": ("untied", "single", 2, VARIABLE + PP2 + VPP),
    "single, dynamic, DP2 distributed optimizer": ("tied", "single", 2, VARIABLE + MICRO2 + ZERO),
    "single, dynamic, CP2 ring": ("untied", "single", 2, VARIABLE + RING),
    "single, dynamic, CP2 ulysses TP2 SP": ("untied", "single", 4, VARIABLE + ULYSSES + TP2 + SP),
    "single, chunked loss": ("untied", "single", 1, CHUNKS),
    "packed": ("untied", "packed", 1, PER_DOCUMENT),
    "packed, positions spelling, micro-batches of 2": ("untied", "packed", 1, ["--reset-position-ids", *MICRO2]),
    "packed, reference kernels": ("untied", "packed", 1, [*PER_DOCUMENT, "--kernels", "reference"]),
    "packed, TP2 SP PP2": ("tied", "packed", 4, PER_DOCUMENT + TP2 + SP + PP2),
    "packed, PP2 VPP2": ("untied", "packed", 2, PER_DOCUMENT + MICRO2 + PP2 + VPP),
    "packed, dynamic, PP2": ("untied", "packed", 2, PER_DOCUMENT + VARIABLE + PP2),
    "packed, CP2 ring": ("untied", "packed", 2, PER_DOCUMENT + RING),
    "packed, CP2 ulysses": ("untied", "packed", 2, PER_DOCUMENT + ULYSSES),
    "packed, CP2 ring PP2": ("untied", "packed", 4, PER_DOCUMENT + RING + PP2),
    "Qwen2.5, packed, TP2 SP PP2": ("qwen2", "packed", 4, PER_DOCUMENT + TP2 + SP + PP2),
    "Qwen2.5, dynamic, DP2 distributed optimizer": ("qwen2", "single", 2, VARIABLE + ZERO),
    "Llama, TP2 PP2": ("llama", "single", 4, VARIABLE + TP2 + PP2),
    "YaRN, packed, CP2 ring TP2 SP": ("yarn", "packed", 4, PER_DOCUMENT + RING + TP2 + SP),
    "YaRN, packed, CP2 ulysses": ("yarn", "packed", 2, PER_DOCUMENT + ULYSSES),
    "YaRN, dynamic, PP2 VPP2": ("yarn", "single", 2, VARIABLE + PP2 + VPP),
    "TP4 SP of 2 KV heads, packed": ("few", "packed", 4, ["--tensor-model-parallel-size", "4", *SP, *PER_DOCUMENT]),
    "moe, packed": ("moe", "packed", 1, PER_DOCUMENT),
    "moe, dynamic, EP2": ("moe", "single", 2, VARIABLE + EP2),
    "moe, packed, TP2 SP EP2": ("moe", "packed", 4, PER_DOCUMENT + TP2 + SP + EP2),
}


@pytest.mark.parametrize("name", SFT)
def test_full_fine_tuning_equals_a_plain_loop(
    name: str, worlds: dict[int, World], models: dict[str, str], data: dict[str, str], plain: Any, tmp_path: Path
) -> None:
    kind, form, size, extra = SFT[name]
    flags = [*FLAGS, "--load", models[kind], "--data-path", data[form], *extra]
    flags += ["--moe-aux-loss-coeff", "0"] if kind == "moe" else []
    gradients = tmp_path / "gradients.npz"
    got = worlds[size].run("gradients", flags=flags, steps=3, file=str(gradients))
    expected = plain(kind, form)
    assert expected["first loss again"] < expected["loss"][0] - 0.1, "the reference learns little; equality says little"
    check(got, expected, gradients)


FROZEN = {
    # Full recomputation of layers whose input has no gradient, and a layer that is frozen as a whole.
    "full recompute": ("untied", 1, FULL, ["model.embed_tokens.*", "model.layers.0.*", "*layernorm*"], []),
    # Nothing is trained on the first stage; the embedding is tied, so the output layer is frozen, too.
    "TP2 SP PP2 distributed optimizer": ("tied", 4, [*TP2, *SP, *PP2, *ZERO], [], ["*.[23].self_attn.*", "*.3.mlp*"]),
}

RECOMPUTED = {
    "experts": ("moe", "*.mlp.experts*", ["--moe-zero-memory", "level0"]),
    "the second product": ("untied", "*.down_proj.*", ["--recompute-activation-function"]),
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_what_is_recomputed_behind_frozen_weights_has_its_gradients(
    name: str, worlds: dict[int, World], models: dict[str, str], data: dict[str, str], tmp_path: Path
) -> None:
    """Nothing before the first MLP is trained: its input asks for no gradient, and what is recomputed had none."""
    kind, trained, recomputed = RECOMPUTED[name]
    flags = [*FLAGS, "--load", models[kind], "--data-path", data["single"], "--freeze-exclude", trained]
    for file, more in (("plain", []), ("recomputed", recomputed)):
        worlds[1].run("gradients", flags=[*flags, *more], steps=1, file=str(tmp_path / f"{file}.npz"))
    plain, again = (dict(np.load(tmp_path / f"{file}.npz")) for file in ("plain", "recomputed"))
    assert all(gradient.any() for gradient in plain.values())
    assert largest_difference(again, plain)[0] <= 1e-6


@pytest.mark.parametrize("name", FROZEN)
def test_a_part_of_the_weights_is_trained_as_by_a_plain_loop(
    name: str, worlds: dict[int, World], models: dict[str, str], data: dict[str, str], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    kind, size, extra, include, exclude = FROZEN[name]
    model = AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        is_in, is_out = (
            any(fnmatch.fnmatch(parameter_name, pattern) for pattern in patterns) for patterns in (include, exclude)
        )
        parameter.requires_grad_(is_out or not (is_in or exclude))
    expected = plain_loop(model, data["single"])
    flags = [*FLAGS, "--load", models[kind], "--data-path", data["single"]]
    for flag, patterns in (("--freeze-include", include), ("--freeze-exclude", exclude)):
        flags += [flag, *patterns] if patterns else []
    gradients = tmp_path / "gradients.npz"
    got = worlds[size].run("gradients", flags=[*flags, *extra], steps=STEPS, file=str(gradients))
    assert got["frozen"]
    assert not got["changed"]
    check(got, expected, gradients)
    # It resumes from a checkpoint that holds every weight and the state of the trained ones.
    save = ["--save", str(tmp_path / "save"), "--ckpt-format", "torch_dist" if size > 1 else "torch"]
    worlds[size].run("train", flags=[*flags, *extra, *save], steps=3)
    again = worlds[1].run("train", flags=[*flags, "--load", str(tmp_path / "save")], steps=1)
    assert again["loss"] == pytest.approx(got["loss"][3:], rel=1e-5)
    # What was frozen may be trained from there on; the first loss is that of the same weights.
    flag, patterns = ("--freeze-exclude", ["*.[23].*"]) if exclude else ("--freeze-include", include[:2])
    more = [flag, *patterns, "--allow-changed", flag[2:].replace("-", "_"), "--load", str(tmp_path / "save")]
    plain = ["--load", models[kind], "--data-path", data["single"]]
    file = tmp_path / "more.npz"
    again = worlds[size].run("gradients", flags=[*FLAGS, *plain, *extra, *more], steps=1, file=str(file))
    assert again["loss"] == pytest.approx(got["loss"][3:], rel=1e-5)
    assert again["frozen"]
    assert not again["changed"]
    assert set(np.load(file)) > set(np.load(gradients))


def test_micro_batch_normalization(
    worlds: dict[int, World], models: dict[str, str], data: dict[str, str], tmp_path: Path
) -> None:
    """The mean of the micro-batches' means, for any way of cutting."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models["untied"], dtype=torch.float32)
    samples = documents(data["single"])[0]
    means = [
        sum(document_loss(model, d) for d in sample) / sum(x != -100 for _, labels in sample for x in labels[1:])
        for sample in samples
    ]
    loss = sum(means) / len(means)
    loss.backward()
    norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt().item()
    flags = [*FLAGS, "--load", models["untied"], "--data-path", data["single"], "--loss-normalization", "micro-batch"]
    for size, extra in ((1, []), (2, ZERO), (2, RING), (2, [*PP2, *VARIABLE])):
        got = worlds[size].run("train", flags=flags + extra, steps=1)
        assert got["loss"][0] == pytest.approx(loss.item(), rel=1e-5)
        assert got["grad_norm"][0] == pytest.approx(norm, rel=1e-5)


ISOLATION = {"PP2": (2, PP2), "PP2 VPP2": (2, PP2 + VPP)}


@pytest.mark.parametrize("name", ISOLATION)
def test_documents_of_a_pack_do_not_see_each_other(
    name: str, worlds: dict[int, World], models: dict[str, str], data: dict[str, str]
) -> None:
    """On every pipeline stage and in every chunk."""
    size, extra = ISOLATION[name]
    flags = [*FLAGS, "--load", models["untied"], "--data-path", data["packed"], *PER_DOCUMENT, *extra]
    flags += ["--global-batch-size", "2"]
    everyone = worlds[size].run("packing_isolation", flags=flags, changed=1)
    layers = [differences for rank in everyone for differences in rank.values()]
    assert len(layers) == 4
    for differences in layers:
        assert differences[1] > 1e-4
        assert len(differences) > 2
        assert max(differences[:1] + differences[2:]) == 0.0


# LoRA
