"""Architecture facts: read in both spellings, written so that every transformers reads them, counted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import llama
from qwen3_npu import log
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import (
    Qwen3Arch,
    flops_per_token,
    from_hf_config,
    hf_config,
    parameter_count,
    read_hf_config,
    to_hf_config,
)
from qwen3_npu.model.sizes import SIZES

# Parameters as the model cards on huggingface.co/Qwen and the safetensors indices count them.
PUBLISHED_PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
}
# GFLOP per token at 4096 tokens.
FLOPS = {"qwen3-0.6b": 4.99, "qwen3-8b": 49.0, "qwen3-32b": 204.8, "qwen3-30b-a3b": 23.1, "qwen3-235b-a22b": 148.3}

PUBLISHED_DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    assert parameter_count(SIZES[name]) == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", FLOPS)
def test_flops_per_token(name: str) -> None:
    assert flops_per_token(SIZES[name], 4096) / 1e9 == pytest.approx(FLOPS[name], rel=2e-3)


def test_published_config_is_the_table_entry() -> None:
    arch = from_hf_config(PUBLISHED_DENSE)
    assert dataclasses.replace(arch, bos_token_id=151643) == SIZES["qwen3-0.6b"]


def test_both_spellings_say_the_same() -> None:
    published = PUBLISHED_DENSE | {
        "model_type": "qwen3_moe",
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    }
    saved_by_5 = dict(published)
    saved_by_5["num_local_experts"] = saved_by_5.pop("num_experts")
    saved_by_5["rope_parameters"] = {"rope_theta": saved_by_5.pop("rope_theta"), "rope_type": "default"}
    saved_by_5.pop("rope_scaling")
    assert from_hf_config(saved_by_5) == from_hf_config(published)
    assert from_hf_config(published).rope_theta == 1e6


@pytest.mark.parametrize("name", SIZES)
def test_written_config_reads_back(name: str) -> None:
    arch = SIZES[name]
    config = to_hf_config(arch)
    assert from_hf_config(json.loads(json.dumps(config))) == arch
    assert "rope_theta" in config
    assert "rope_parameters" not in config
    if arch.is_moe:
        assert config["num_experts"] == 128
        assert "num_local_experts" not in config


def test_written_config_carries_what_it_does_not_know() -> None:
    config = to_hf_config(SIZES["qwen3-8b"], {"use_cache": False, "my_key": 3, "eos_token_id": [151645, 151643]})
    assert config["use_cache"] is False
    assert config["my_key"] == 3
    assert config["eos_token_id"] == [151645, 151643]


def test_transformers_reads_the_written_config(tmp_path: Path) -> None:
    from transformers import AutoConfig

    for name in ("qwen3-0.6b", "qwen3-30b-a3b"):
        (tmp_path / "config.json").write_text(json.dumps(to_hf_config(SIZES[name])))
        config = AutoConfig.from_pretrained(tmp_path)
        assert config.rope_parameters["rope_theta"] == 1e6
        assert config.head_dim == 128
        assert getattr(config, "num_experts", 128) == 128
        assert from_hf_config(config.to_dict()) == SIZES[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; only 'qwen3', 'qwen3_moe' and 'qwen2'"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"attention_bias": True}, "attention_bias true is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4}}, "rope_scaling of type 'dynamic'"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "qwen3_moe"}, "no num_experts or num_local_experts"),
        ({"head_dim": 127}, "odd"),
    ],
)
def test_what_is_not_qwen3_is_refused(change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_hf_config(PUBLISHED_DENSE | change)


def test_unreadable_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config.json does not exist"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read as JSON"):
        read_hf_config(tmp_path)


def test_moe_needs_sizes_of_experts() -> None:
    with pytest.raises(UsageError, match="num_experts_per_tok"):
        dataclasses.replace(SIZES["qwen3-30b-a3b"], num_experts_per_tok=200)


def test_same_weights() -> None:
    arch: Qwen3Arch = SIZES["qwen3-8b"]
    assert arch.same_weights(dataclasses.replace(arch, rope_theta=1.0, bos_token_id=None))
    assert not arch.same_weights(SIZES["qwen3-14b"])


MOE = PUBLISHED_DENSE | {"model_type": "qwen3_moe", "num_experts_per_tok": 2, "moe_intermediate_size": 768}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (MOE | {"num_experts": 4, "num_local_experts": 8}, "num_local_experts 8 and num_experts 4 differ"),
        (
            PUBLISHED_DENSE | {"rope_parameters": {"rope_theta": 5e5}},
            "rope_theta 1e+06 and the inner one 500000",
        ),
        (PUBLISHED_DENSE | {"dtype": "float32"}, "dtype 'float32' and torch_dtype 'bfloat16' differ"),
    ],
)
def test_a_fact_said_twice_is_taken_as_transformers_takes_it(
    change: dict, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    monkeypatch.setattr(log.LOGGER, "propagate", True)
    monkeypatch.setattr(log.LOGGER, "handlers", [])  # an earlier test's `log.setup`, or pytest's own, would count twice
    hf_config._tell.cache_clear()
    (tmp_path / "config.json").write_text(json.dumps(change))
    theirs = AutoConfig.from_pretrained(tmp_path)
    for config in (change, to_hf_config(from_hf_config(change), change)):  # as it came, and exported
        arch = from_hf_config(config)
        assert arch.num_experts == getattr(theirs, "num_experts", 0)
        assert arch.rope_theta == theirs.rope_parameters["rope_theta"]
    assert said in caplog.text
    assert caplog.text.count(said) == 1


OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "qwen2", "llama"])
def test_absent_keys_are_what_transformers_takes(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    sizes = {"hidden_size": 2048, "num_attention_heads": 32, "num_hidden_layers": 2, "intermediate_size": 96}
    config = {"model_type": kind, "vocab_size": 100, **sizes}
    if kind == "qwen3_moe":
        config |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoConfig.from_pretrained(tmp_path)
    with llama.registered():
        arch = from_hf_config(config)
    for name in (*OPTIONAL, *(["norm_topk_prob", "router_aux_loss_coef"] if kind == "qwen3_moe" else [])):
        expected = getattr(theirs, name, None)
        assert getattr(arch, name) == (2048 // 32 if expected is None else expected), name
    assert arch.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "1024"}, "hidden_size is '1024'; an integer is expected"),
        ({"hidden_size": 1024.0}, "hidden_size is 1024.0; an integer is expected"),
        ({"num_attention_heads": True}, "num_attention_heads is true; an integer is expected"),
        ({"vocab_size": -1}, "vocab_size is -1; at least 1"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf; a finite number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; true or false"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id is '2'; an integer"),
        ({"bos_token_id": [1]}, "bos_token_id is"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"model_type": ["qwen3"]}, "model_type is"),
    ],
)
def test_types_and_ranges_are_checked(change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        from_hf_config(PUBLISHED_DENSE | change)
    assert "\n" not in str(refused.value)


def test_every_ending_token_is_kept() -> None:
    config = PUBLISHED_DENSE | {"eos_token_id": [7, 8, 9]}
    assert from_hf_config(config).eos_token_ids == (7, 8, 9)
    assert to_hf_config(from_hf_config(config))["eos_token_id"] == [7, 8, 9]
