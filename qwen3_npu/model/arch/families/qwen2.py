"""Qwen2.5, dense (transformers' Qwen2Config): a bias on q, k and v, no norm of queries and keys."""

from __future__ import annotations

from qwen3_npu.model.arch.families.family import Family

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    title="Qwen2.5",
    qkv_bias=True,
    defaults={
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    },
    fixed={"hidden_act": ("silu",), "use_sliding_window": (False,)},
)
