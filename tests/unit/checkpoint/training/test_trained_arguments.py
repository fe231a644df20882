"""What a Megatron checkpoint's own arguments say of its training is honoured or refused, never passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import samples
import torch

YARN = {
    "rope_scaling_type": "yarn",
    "rope_scaling_factor": 4.0,
    "rope_scaling_original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "rope_scaling_mscale": 1.0,
    "rope_scaling_mscale_all_dim": 0.0,
}


@pytest.fixture
def trained(models: dict[str, Path], tmp_path: Path) -> Any:
    """Makes a checkpoint whose arguments are changed, as torch writes it, without a config.json."""

    def make(**changes: Any) -> Path:
        samples.to_mg(models["untied"], tmp_path / "mg")
        (tmp_path / "mg" / "config.json").unlink()
        (file,) = (tmp_path / "mg").rglob("model_optim_rng.pt")
        content = torch.load(file, weights_only=False)
        vars(content["args"]).update(changes)
        torch.save(content, file)
        for extra in (tmp_path / "mg").rglob("integrity.json"):
            extra.unlink()
        return tmp_path / "mg"

    return make


def test_yarn_is_honoured(trained: Any, tmp_path: Path) -> None:
    samples.to_hf(trained(**YARN, max_position_embeddings=2048), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert config["rope_scaling"] == expected
    assert config["max_position_embeddings"] == 2048


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_percent": 0.5}, "rotary_percent 0.5 is another architecture"),
        ({"position_embedding_type": "none"}, "position_embedding_type 'none' is another architecture"),
        ({"rope_scaling_type": "plm"}, "rope_scaling_type 'plm' is another architecture"),
        ({"rope_scaling_type": "yarn"}, "rope_scaling_factor is missing"),
        ({"normalization": "LayerNorm"}, "normalization 'LayerNorm' is another architecture"),
        ({"add_qkv_bias": True}, "qk_layernorm True, add_qkv_bias True"),
        ({"num_layers": "4"}, "num_layers is '4'; an integer is expected"),
    ],
)
def test_what_is_not_computed_is_refused(changes: dict[str, Any], message: str, trained: Any, tmp_path: Path) -> None:
    folder = trained(**changes)
    line = samples.refused(
        "--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", folder, "--save-dir", tmp_path / "x"
    )
    assert message in line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (YARN, "was trained with rope_scaling YaRN x4 of 128 positions, here plain RoPE"),
        ({"rotary_base": 500000.0}, "was trained with rope_theta 500000.0, here 1000000.0"),
        ({"norm_epsilon": 1e-5}, "was trained with rms_norm_eps 1e-05, here 1e-06"),
        ({"rotary_interleaved": True}, "rotary_interleaved true is another architecture"),
    ],
)
def test_a_config_json_does_not_hide_them(
    changes: dict[str, Any], message: str, trained: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    folder, config = trained(**changes), models["untied"]
    flags = ("--load-model-type", "mg", "--save-model-type", "hf", "--hf-cfg-dir", config)
    assert message in samples.refused(*flags, "--load-dir", folder, "--save-dir", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_arguments_do_not_say_is_taken_aloud(trained: Any, tmp_path: Path) -> None:
    """A config.json of transformers 5 has rope_theta inside a dict, which MindSpeed-LLM's converter leaves out."""
    out = samples.to_hf(trained(rotary_base=None), tmp_path / "hf")
    assert "its args have no rotary_base; 1e+06 is taken" in out


def test_an_argument_of_a_later_version_can_be_ignored(trained: Any, tmp_path: Path) -> None:
    folder = trained(attention_quick_path=True)
    flags = ("--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", folder, "--save-dir", tmp_path / "x")
    assert "is left out by convert_ckpt.py --ignore-args attention_quick_path" in samples.refused(*flags)
    assert samples.run(*flags, "--ignore-args", "attention_quick_path").code == 0
    assert (tmp_path / "x" / "config.json").is_file()
