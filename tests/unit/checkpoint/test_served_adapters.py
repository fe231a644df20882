"""Exported adapters of MoE models have what vLLM's loader takes. docs/serving.md says how that loader was run on them.

vllm/lora (0.11.2 and 0.23.0): a tensor is named base_model.model.MODULE.lora_A.weight; MODULE from "experts" on must be
experts.E.gate_proj, .up_proj or .down_proj (Qwen3MoeForCausalLM.get_expert_mapping); every expert must have all three,
of one rank, as matrices (PackedLoRALayerWeights.pack_moe); the scaling is lora_alpha / r of adapter_config.json alone,
which 0.23.0 takes for experts even where use_rslora says / sqrt(r).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import samples

from qwen3_npu.checkpoint.mapping.lora import Lora


def test_an_exported_adapter_of_experts_is_what_vllm_loads(real_models: dict[str, Path], tmp_path: Path) -> None:
    arch = samples.ARCHS["moe"]  # 8 experts of width 32, hidden 64
    lora = Lora(4, 8.0, samples.ALL_TARGETS)
    peft = samples.write_adapter(tmp_path / "peft", arch, lora, shared_a=True)
    samples.to_mg(peft, tmp_path / "mg", "--hf-cfg-dir", real_models["moe"], "--target-expert-parallel-size", 2)
    flags = ("--load-dir", tmp_path / "mg", "--hf-cfg-dir", real_models["moe"], "--save-lora-to-hf")
    samples.ok("--load-model-type", "mg", "--save-model-type", "hf", *flags, "--save-dir", tmp_path / "out")
    stored = {n: t.shape for n, t in samples.tensors(tmp_path / "out" / "adapter_model.safetensors").items()}
    experts = {name: shape for name, shape in stored.items() if ".experts" in name}
    projections = {"gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}
    assert experts == {
        f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}.lora_{side}.weight": shape
        for layer in range(arch.num_hidden_layers)
        for expert in range(8)
        for name, (width, height) in projections.items()
        for side, shape in (("A", (4, width)), ("B", (height, 4)))
    }
    others = {name.split(".")[-3] for name in stored if ".experts" not in name}
    assert others == {"q_proj", "k_proj", "v_proj", "o_proj"}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"], config["use_dora"]) == (4, 8, "none", False)
    assert not {"rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters"} & {
        k for k in config if config[k]
    }


def test_rslora_of_experts_is_exported_as_lora_of_the_same_scale(real_models: dict[str, Path], tmp_path: Path) -> None:
    lora = Lora(8, 6.0, samples.ALL_TARGETS, is_stabilized=True)
    for kind in ("moe", "untied"):
        peft = samples.write_adapter(tmp_path / kind, samples.ARCHS[kind], lora, shared_a=True)
        samples.to_mg(peft, tmp_path / f"{kind}-mg", "--hf-cfg-dir", real_models[kind])
        flags = ("--hf-cfg-dir", real_models[kind], "--save-lora-to-hf")
        samples.to_hf(tmp_path / f"{kind}-mg", tmp_path / f"{kind}-out", *flags)
        config = json.loads((tmp_path / f"{kind}-out" / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / (8**0.5 if config["use_rslora"] else 8)
        assert config["use_rslora"] == (kind == "untied")
        assert scale == pytest.approx(6 / 8**0.5, rel=1e-12)


@pytest.mark.parametrize("target", ["linear_fc1", "linear_fc2"])
def test_half_an_adapter_of_experts_is_exported_with_a_word(
    target: str, real_models: dict[str, Path], tmp_path: Path
) -> None:
    """vLLM 0.11.2 leaves it out in silence, 0.23.0 fails at an assertion."""
    lora = Lora(4, 8.0, ("linear_qkv", target))
    peft = samples.write_adapter(tmp_path / "peft", samples.ARCHS["moe"], lora, shared_a=True)
    samples.to_mg(peft, tmp_path / "mg", "--hf-cfg-dir", real_models["moe"])
    flags = ("--hf-cfg-dir", real_models["moe"], "--save-lora-to-hf")
    assert "merge it to serve it" in samples.to_hf(tmp_path / "mg", tmp_path / "out", *flags)
