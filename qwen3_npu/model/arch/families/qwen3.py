"""Qwen3, dense and mixture of experts (transformers' Qwen3Config and Qwen3MoeConfig)."""

from __future__ import annotations

from qwen3_npu.model.arch.families.family import Family

_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_FIXED = {"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)}

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    title="Qwen3",
    qk_norm=True,
    # Qwen3MoeConfig has no head_dim of its own and falls back to hidden_size / num_attention_heads.
    defaults={**_DEFAULTS, "head_dim": 128},
    fixed=_FIXED,
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    title="Qwen3",
    moe=True,
    qk_norm=True,
    defaults={**_DEFAULTS, "num_key_value_heads": 4, "norm_topk_prob": False, "router_aux_loss_coef": 0.001},
    fixed={**_FIXED, "mlp_only_layers": ([],), "decoder_sparse_step": (1,)},
)
