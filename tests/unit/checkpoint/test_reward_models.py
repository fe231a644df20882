"""Reward models through the converter: any layout and back, with adapters, into peft."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import samples
from safetensors.numpy import load_file

import tiny
from qwen3_npu.checkpoint.mapping.lora import Lora

TO_MG = ("--load-model-type", "hf", "--save-model-type", "mg")
TO_HF = ("--load-model-type", "mg", "--save-model-type", "hf")


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_the_way_to_megatron_and_back(form: str, tmp_path: Path) -> None:
    hf, mg, back = tmp_path / "hf", tmp_path / "mg", tmp_path / "back"
    tiny.write_model(hf, tiny.arch("moe").as_reward())
    sizes = ("--target-pipeline-parallel-size", 2, "--target-expert-parallel-size", 2, "--ckpt-format", form)
    samples.ok(*TO_MG, "--load-dir", hf, "--save-dir", mg, *sizes, "--verify")
    samples.ok(*TO_HF, "--load-dir", mg, "--save-dir", back, "--verify")
    first, second = (load_file(folder / "model.safetensors") for folder in (hf, back))
    assert first["score.weight"].shape == (1, 64)
    assert "lm_head.weight" not in first
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert json.loads((back / "config.json").read_text())["architectures"] == ["Qwen3MoeForSequenceClassification"]


def test_an_adapter_brings_its_head(tmp_path: Path) -> None:
    """peft, with the same adapter on the same base, is the oracle of the merge."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    arch, hf, adapter, merged = tiny.arch("untied"), tmp_path / "hf", tmp_path / "adapter", tmp_path / "merged"
    tiny.write_model(hf, arch)
    samples.write_adapter(adapter, arch.as_reward(), Lora(4, 8.0, samples.ALL_TARGETS))
    samples.ok(
        *("--load-model-type", "hf", "--save-model-type", "hf", "--load-dir", hf, "--lora-load", adapter),
        *("--save-dir", merged, "--verify", "--lora-check"),
    )
    base = AutoModelForSequenceClassification.from_pretrained(hf, dtype=torch.float32, num_labels=1)
    theirs = PeftModel.from_pretrained(base, adapter).eval()
    ours = AutoModelForSequenceClassification.from_pretrained(merged, dtype=torch.float32)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        assert torch.allclose(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5)
    head = load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert np.array_equal(load_file(merged / "model.safetensors")["score.weight"], head)
