"""Rotary embedding: every spelling of config.json and of Megatron's arguments means what its own reader makes of it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from qwen3_npu.args.model import ShapeArgs, positions_note, shaped
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import from_hf_config, to_hf_config
from qwen3_npu.model.arch.megatron import from_megatron, to_megatron
from qwen3_npu.model.arch.rope import LINEAR, LLAMA3, YARN, Rope, RopeScaling

YARN4 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA["original_max_position_embeddings"] = 256
SPELLINGS: dict[str, dict[str, Any]] = {
    "plain, no theta": {"rope_theta": "ABSENT"},
    "inner theta before outer": {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    "inner without theta": {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}},
    "rope_scaling before rope_parameters": {
        "rope_theta": 1e6,
        "rope_scaling": YARN4,
        "rope_parameters": {"rope_theta": 1e5, "rope_type": "linear", "factor": 2.0},
    },
    "by kind of layer": {"rope_parameters": {"full_attention": {"rope_theta": 1e5, **LLAMA}}},
    "yarn": {"rope_scaling": YARN4},
    "yarn, old spelling": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    "yarn, new spelling": {"rope_theta": "ABSENT", "rope_parameters": {"rope_theta": 1e6, **YARN4}},
    "rope_type before type": {"rope_scaling": {"type": "linear", **YARN4}},
    "yarn, original is the longest": {"rope_scaling": {"rope_type": "yarn", "factor": 3.0}},
    "yarn, outer original": {"rope_scaling": YARN4, "original_max_position_embeddings": 64},
    "yarn, factor follows": {"rope_scaling": {**YARN4, "factor": None}},
    "yarn, attention factor": {"rope_scaling": {**YARN4, "attention_factor": 1.25}},
    "yarn, mscale": {"rope_scaling": {**YARN4, "mscale": 0.707, "mscale_all_dim": 0.5}},
    "yarn, one mscale": {"rope_scaling": {**YARN4, "mscale": 0.707, "mscale_all_dim": 0.0}},
    "yarn, betas": {"rope_scaling": {**YARN4, "beta_fast": 16, "beta_slow": 2}},
    "yarn, not truncated": {"rope_scaling": {**YARN4, "truncate": False}},
    "yarn, one dimension between": {"rope_scaling": {**YARN4, "beta_fast": 1, "beta_slow": 1, "truncate": False}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "llama3": {"rope_scaling": LLAMA},
    "dynamic that never changes": {"rope_scaling": {"rope_type": "dynamic", "factor": 1.0}},
}


def spelled(change: dict[str, Any]) -> dict[str, Any]:
    """A tiny config.json with a spelling of rotary embedding."""
    config = {**to_hf_config(tiny.arch(head_dim=64)), "rope_theta": 1e6, **change}
    config = {key: value for key, value in config.items() if value not in ("ABSENT", None)}
    return config


def transformers_rope(config: dict[str, Any], folder: Path) -> tuple[torch.Tensor, float]:
    """Inverse frequencies and attention factor that transformers computes from a config.json."""
    from transformers import AutoConfig
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    (folder / "config.json").write_text(json.dumps(config))
    loaded = AutoConfig.from_pretrained(folder)
    nested = (loaded.rope_parameters or {}).get("full_attention")
    if nested:  # Qwen3's module takes one kind of layer only
        loaded.rope_parameters = nested
    made = Qwen3RotaryEmbedding(loaded)
    return made.inv_freq, made.attention_scaling


@pytest.mark.parametrize("name", SPELLINGS)
def test_config_json_means_what_transformers_reads(name: str, tmp_path: Path) -> None:
    from qwen3_npu.model.sequence import frequencies

    config = spelled(SPELLINGS[name])
    arch = from_hf_config(config)
    expected, attention_factor = transformers_rope(config, tmp_path)
    torch.testing.assert_close(frequencies(arch.rope, torch.device("cpu")), expected, rtol=3e-7, atol=0)
    assert arch.rope.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    written = to_hf_config(arch, config)
    assert from_hf_config(json.loads(json.dumps(written))) == arch
    again, attention_factor = transformers_rope(written, tmp_path)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)
    assert arch.rope.attention_factor == pytest.approx(attention_factor, rel=1e-12)


@pytest.mark.parametrize("name", SPELLINGS)
def test_arguments_written_into_a_checkpoint_read_back(name: str) -> None:
    arch = from_hf_config(spelled(SPELLINGS[name]))
    assert from_megatron({**to_megatron(arch), "num_layers": 4}, "x") == arch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "type 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "type 'longrope' is not supported"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "type 'mrope' is not supported"),
        ({"rope_scaling": {**YARN4, "extrapolation_factor": 1}}, "extrapolation_factor is not understood"),
        ({"rope_scaling": {**YARN4, "factor": "4"}}, "factor is '4'; a number is expected"),
        ({"rope_scaling": {**YARN4, "factor": 0.5}}, "at least 1 is expected"),
        ({"rope_scaling": {**YARN4, "beta_fast": 1, "beta_slow": 2}}, "beta_fast 1 is below beta_slow 2"),
        ({"rope_scaling": {"rope_type": "linear"}}, "has no factor"),
        ({"rope_scaling": {**LLAMA, "high_freq_factor": 1.0}}, "is not above low_freq_factor"),
        # transformers looks null up among its kinds of embedding, and has none of that name.
        ({"rope_scaling": {**YARN4, "rope_type": None}}, "rope_scaling of type null is not supported"),
        ({"rope_scaling": {**YARN4, "rope_type": None, "type": "yarn"}}, "of type null is not supported"),
        ({"rope_scaling": [4]}, "a JSON object is expected"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta is '1e6'; a number is expected"),
        ({"rope_parameters": {"rope_theta": True}}, "a number is expected"),
        ({"rope_theta": math.nan}, "a finite number is expected"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "has kinds of layers"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        from_hf_config(spelled(change))
    assert "\n" not in str(refused.value)


PLAIN_ARGS = {
    **to_megatron(tiny.arch()),
    "num_layers": 4,
    "hf_model_type": None,
}


@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (None, None), (0.8, 0.3)])
@pytest.mark.usefixtures("process")
def test_megatron_arguments_of_yarn_mean_what_megatron_computes(rounds: bool, weights: tuple[Any, Any]) -> None:
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    from qwen3_npu.model.sequence import frequencies

    said = {"rotary_scaling_factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 24.0, "beta_slow": 1.5}
    said |= {"mscale": weights[0], "mscale_all_dim": weights[1], "correction_range_round_to_int": rounds}
    args = {**PLAIN_ARGS, "position_embedding_type": "yarn", "kv_channels": 64, "rotary_base": 1e4}
    arch = from_megatron({**args, **{f"yarn_{name}": value for name, value in said.items()}}, "x")
    theirs = YarnRotaryEmbedding(
        64, rotary_base=1e4, scaling_factor=said.pop("rotary_scaling_factor"), use_cpu_initialization=True, **said
    )
    angles, factor = theirs.get_emb(2)
    ours = frequencies(arch.rope, torch.device("cpu"))
    torch.testing.assert_close(ours, angles[1, 0, 0, :32].cpu(), rtol=3e-7, atol=0)
    assert arch.rope.attention_factor == pytest.approx(factor, rel=1e-12)


def test_mindspeed_arguments_of_yarn_in_both_spellings() -> None:
    said = {"rope_scaling_type": "yarn", "rope_scaling_factor": 4.0, "rope_scaling_mscale": 1.0}
    said |= {"rope_scaling_original_max_position_embeddings": 32768, "rope_scaling_mscale_all_dim": 0.0}
    for old in ({"beta_fast": 16, "beta_slow": 2}, {"rope_scaling_beta_fast": 16, "rope_scaling_beta_slow": 2}):
        scaling = from_megatron({**PLAIN_ARGS, **said, **old}, "x").rope_scaling
        # 0.1 ln(4) + 1, as YaRN's paper has it
        assert scaling == RopeScaling(
            kind=YARN,
            factor=4.0,
            original=32768,
            attention_factor=0.1 * math.log(4) + 1,
            beta_fast=16.0,
            beta_slow=2.0,
        )


def test_other_megatron_arguments_of_rope() -> None:
    args = {**PLAIN_ARGS, "rope_scaling_factor": 8.0}
    assert from_megatron(args, "x").rope_scaling is None
    llama = RopeScaling(kind=LLAMA3, factor=8.0, original=8192, low_freq_factor=1.0, high_freq_factor=4.0)
    assert from_megatron({**args, "use_rope_scaling": True}, "x").rope_scaling == llama
    linear = from_megatron({**args, "rotary_seq_len_interpolation_factor": 2}, "x").rope_scaling
    assert linear == RopeScaling(kind=LINEAR, factor=2.0)


class TestFlags:
    """What the command line adds to an architecture."""

    ARCH = tiny.arch()

    def test_yarn_by_flags(self) -> None:
        flags = ShapeArgs(
            rope_scaling_type="yarn",
            rope_scaling_factor=4.0,
            rope_scaling_original_max_position_embeddings=512,
            rope_scaling_mscale=1.0,
            rope_scaling_mscale_all_dim=0.0,
        )
        arch = shaped(flags, self.ARCH)
        assert arch.max_position_embeddings == 2048
        assert str(arch.rope_scaling) == "YaRN x4 of 512 positions"
        assert shaped(flags, arch) == arch
        assert positions_note(arch, self.ARCH) == ["positions: up to 2048, YaRN x4 of 512 positions"]
        other = dataclasses.replace(flags, rope_scaling_factor=2.0)
        with pytest.raises(UsageError, match="the flags say YaRN x2"):
            shaped(other, arch)

    def test_more_positions_are_kept_and_told(self) -> None:
        arch = shaped(ShapeArgs(max_position_embeddings=1024), self.ARCH)
        assert arch.max_position_embeddings == 1024
        assert "plain RoPE stretched beyond the 512" in positions_note(arch, self.ARCH)[0]
        assert shaped(ShapeArgs(max_position_embeddings=128), self.ARCH) == self.ARCH

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ({"rope_scaling_factor": 4.0}, "--rope-scaling-factor has no effect alone"),
            ({"rope_scaling_type": "yarn"}, "needs --rope-scaling-factor and --rope-scaling-original"),
            ({"rope_scaling_type": "llama3", "rope_scaling_factor": 8.0}, "needs --original-max-position-embeddings"),
            ({"low_freq_factor": 1.0}, "it belongs to --rope-scaling-type llama3"),
            ({"add_qkv_bias": True}, "--add-qkv-bias: Qwen3 has no bias in q, k and v"),
            ({"qk_layernorm": False}, "--no-qk-layernorm: Qwen3 has a norm"),
        ],
    )
    def test_flags_without_effect_are_refused(self, flags: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            shaped(ShapeArgs(**flags), self.ARCH)


def test_frequencies_of_plain_rope_are_exact() -> None:
    from qwen3_npu.model.sequence import frequencies

    assert Rope(1e6, 128).divisors is None
    exponent = torch.arange(0, 128, 2, dtype=torch.int64).float() / 128
    assert torch.equal(frequencies(Rope(1e6, 128), torch.device("cpu")), 1.0 / (1e6**exponent))
