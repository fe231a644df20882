"""Exported adapters of MoE models have what vLLM's loader takes: read from its source, which runs on no CPU here.

vllm/lora: a tensor is named base_model.model.MODULE.lora_A.weight; MODULE from "experts" on must be
experts.E.gate_proj, .up_proj or .down_proj (Qwen3MoeForCausalLM.get_expert_mapping); every expert must have all three,
of one rank, as matrices (PackedLoRALayerWeights.pack_moe); the scaling is lora_alpha / r, or / sqrt(r), of
adapter_config.json alone.
"""

from __future__ import annotations

import json
from pathlib import Path

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
