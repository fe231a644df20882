"""Adapters as peft makes them: what can be merged computes what peft computes, all else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import samples
import torch
import transformers

from apart import experts_apart

transformers.utils.logging.disable_progress_bar()
TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79], [1, 2, 3, 5, 8, 13, 21, 34]])
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(folder: Path, *, apart: bool = False) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return experts_apart(model) if apart else model


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(TOKENS).logits.numpy()


def adapter(base: Path, folder: Path, **config: Any) -> np.ndarray:
    """Let peft make and save an adapter with random B; what base and adapter compute in peft, from disk."""
    torch.manual_seed(0)
    apart = "gate_proj" in config["target_modules"] and "moe" in base.name
    model = peft.get_peft_model(load(base, apart=apart), peft.LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return logits(peft.PeftModel.from_pretrained(load(base, apart=apart), str(folder)))


def merge(base: Path, folder: Path, out: Path) -> np.ndarray:
    samples.ok("--load-dir", base, "--lora-load", folder, "--save-model-type", "hf", "--save-dir", out, "--verify")
    return logits(load(out))


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TAKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "an expression": ("untied", {"target_modules": r".*\.(q_proj|down_proj)"}),
    "all-linear": ("untied", {"target_modules": "all-linear"}),
    "some layers": ("untied", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 3]}),
    "excluded modules": ("untied", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": [r"layers\.2.*q_proj"]}),
    "rslora": ("untied", {"target_modules": ALL, "use_rslora": True, "r": 4, "lora_alpha": 6}),
    "ranks and alphas of their own": (
        "untied",
        {
            "target_modules": ALL,
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 8},
            "alpha_pattern": {r".*\.o_proj": 10, "k_proj": 3},
        },
    ),
    "experts as parameters": (
        "moe",
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "target_parameters": EXPERTS,
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {r".*\.gate_up_proj": 8},
            "alpha_pattern": {r".*\.gate_up_proj": 16},
        },
    ),
    "embedding and output layer": ("untied", {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "r": 4}),
    "each in layers of its own": (
        "untied",
        {"target_modules": r".*(layers\.2.*(k_proj|o_proj)|[13].*gate_proj)", "r": 4},
    ),
    "DoRA": ("untied", {"target_modules": ALL, "use_dora": True, "r": 4, "layers_to_transform": [0, 2, 3]}),
    "DoRA beside experts": ("moe", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "use_dora": True}),
    "DoRA of embedding and output layer": ("untied", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "DoRA of experts": ("moe", {"target_modules": ALL, "use_dora": True, "r": 4}),
    "one parameter of the experts": ("moe", {"target_modules": [], "target_parameters": ["down_proj"], "r": 2}),
}


EXPORTED: dict[str, Any] = {
    "rslora": lambda config: config.use_rslora,
    "DoRA": lambda config: config.use_dora,
    "DoRA of embedding and output layer": lambda config: config.use_dora,
    "DoRA of experts": lambda config: config.use_dora,
    "some layers": lambda config: config.layers_to_transform == [1, 3],
    "embedding and output layer": lambda config: {"embed_tokens", "lm_head"} < set(config.target_modules),
    "each in layers of its own": lambda config: "model.layers.3.mlp.gate_proj" in config.target_modules,
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_peft_computes_is_merged(name: str, real_models: dict[str, Path], tmp_path: Path) -> None:
    kind, config = TAKEN[name]
    expected = adapter(real_models[kind], tmp_path / "adapter", **config)
    assert np.abs(expected - logits(load(real_models[kind]))).max() > 0.02, "the adapter matters"
    assert np.abs(merge(real_models[kind], tmp_path / "adapter", tmp_path / "hf") - expected).max() < 1e-5
    # The same through a Megatron adapter, which has one A per linear.
    flags = ("--hf-cfg-dir", real_models[kind], "--target-tensor-parallel-size", 2)
    samples.to_mg(tmp_path / "adapter", tmp_path / "mg", *flags, "--verify")
    assert np.abs(merge(real_models[kind], tmp_path / "mg", tmp_path / "hf2") - expected).max() < 1e-5
    if name in EXPORTED:
        flags = ("--load-model-type", "mg", "--save-model-type", "hf", "--save-lora-to-hf")
        samples.ok(*flags, "--load-dir", tmp_path / "mg", "--save-dir", tmp_path / "peft", "--verify")
        config = peft.PeftConfig.from_pretrained(str(tmp_path / "peft"))
        assert EXPORTED[name](config)
        base = load(real_models[kind], apart=name == "DoRA of experts")
        back = peft.PeftModel.from_pretrained(base, str(tmp_path / "peft"))
        assert np.abs(logits(back) - expected).max() < 1e-5


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_a_start_that_changes_the_base_is_refused_with_the_way_out(start: str, real_models: dict, tmp_path) -> None:
    base = real_models["untied"]
    adapter(base, tmp_path / "adapter", target_modules=["q_proj"], init_lora_weights=start)
    line = refused(base, tmp_path / "adapter", tmp_path)
    assert f"init_lora_weights '{start}' is not supported" in line
    assert "path_initial_model_for_weight_conversion" in line


def test_a_converted_pissa_adapter_is_merged(real_models: dict, tmp_path: Path) -> None:
    """The way out that the refusal names, gone with peft."""
    base, start, end = real_models["untied"], tmp_path / "start", tmp_path / "end"
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    model = peft.get_peft_model(load(base), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(start, save_embedding_layers=False)
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = logits(model)
    model.save_pretrained(end, path_initial_model_for_weight_conversion=str(start), save_embedding_layers=False)
    assert np.abs(merge(base, end, tmp_path / "hf") - expected).max() < 1e-5


def refused(base: Path, folder: Path, tmp_path: Path) -> str:
    line = samples.refused("--load-dir", base, "--lora-load", folder, "--save-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return line


NAN = float("nan")
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "a field from the future": ({"use_magic": True}, "'use_magic' is not understood"),
    "a misspelt field": ({"use_dorra": None}, "did you mean use_dora?"),
    "DoRA": ({"use_dora": True}, "tensors missing for DoRA"),
    "DoRA as a number": ({"use_dora": 1}, "use_dora is 1; true or false is expected"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out true"),
    "biases": ({"bias": "all"}, "bias 'all'"),
    "modules to save": ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head']"),
    "an unknown start": ({"init_lora_weights": "magic"}, "init_lora_weights 'magic'"),
    "CorDA": ({"init_lora_weights": "corda"}, "init_lora_weights 'corda'"),
    "alpha NaN": ({"lora_alpha": NAN}, "lora_alpha is nan; a finite number is expected"),
    "alpha infinite": ({"lora_alpha": float("inf")}, "lora_alpha is inf; a finite number is expected"),
    "alpha negative": ({"lora_alpha": -8}, "lora_alpha is -8.0; a number above 0 is expected"),
    "alpha as text": ({"lora_alpha": "8"}, "lora_alpha is '8'; a number is expected"),
    "no alpha": ({"lora_alpha": None}, "has no lora_alpha"),
    "another rank": ({"r": 8}, "has rank 4; "),
    "no rank": ({"r": None}, "has no r"),
    "a rank of its own": ({"rank_pattern": {"q_proj": 2}}, "q_proj has rank 4; "),
    "rank as a float": ({"r": 4.0}, "r is 4.0; an integer is expected"),
    "an alpha of its own, NaN": ({"alpha_pattern": {"q_proj": NAN}}, "alpha_pattern: q_proj is nan"),
    "a slow expression": ({"alpha_pattern": {"(a|[a-z._])*x": 2}}, "alpha_pattern '(a|[a-z._])*x' is not supported"),
    "no expression": ({"alpha_pattern": {"(": 2}}, "alpha_pattern '(' is no expression"),
    "fewer modules": ({"target_modules": ["q_proj"]}, "tensors not expected for "),
    "fewer layers": ({"layers_to_transform": [0]}, "tensors not expected for "),
    "unknown modules": ({"target_modules": ["c_attn"]}, "target_modules 'c_attn' not supported"),
    "another kind": ({"peft_type": "LOHA"}, "peft_type LORA expected"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_field_that_is_not_understood_is_refused_by_name(name: str, real_models: dict, tmp_path: Path) -> None:
    lora = samples.Lora(4, 8.0, ("linear_qkv",))
    folder = samples.write_adapter(tmp_path / "adapter", samples.ARCHS["tied"], lora)
    changes, message = CHANGES[name]
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert message in refused(real_models["tied"], folder, tmp_path)


def test_an_embedding_beside_an_adapter_must_be_that_of_the_base(real_models: dict, tmp_path: Path) -> None:
    """peft saves it, and takes it in place of the base's."""
    adapter(real_models["untied"], tmp_path / "adapter", target_modules=["embed_tokens"], r=2)
    other = samples.write_floats(tmp_path / "other", samples.ARCHS["untied"], samples.F32, seed=9)
    assert "holds a model.embed_tokens.weight of its own" in refused(other, tmp_path / "adapter", tmp_path)
    adapter(real_models["tied"], tmp_path / "tied", target_modules=["embed_tokens"], r=2)
    assert "tensors not expected for Qwen3 dense" in refused(real_models["tied"], tmp_path / "tied", tmp_path)


def test_an_adapter_that_lacks_tensors_is_refused(real_models: dict, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    lora = samples.Lora(4, 8.0, ("linear_qkv",))
    folder = samples.write_adapter(tmp_path / "adapter", samples.ARCHS["tied"], lora)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    stem = "base_model.model.model.layers.1.self_attn.k_proj.lora_"
    b = tensors.pop(stem + "B.weight")
    save_file(tensors, path)
    assert f"tensors missing: {stem}B.weight" in refused(real_models["tied"], folder, tmp_path)
    tensors.pop(stem + "A.weight")
    save_file(tensors, path)
    assert "tensors missing for " in refused(real_models["tied"], folder, tmp_path)
    save_file({**tensors, "base_model.model.lm_head.lora_A.weight": b}, path)
    assert "tensors not expected for Qwen3 dense" in refused(real_models["tied"], folder, tmp_path)
