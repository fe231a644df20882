"""Plain Llama, added from outside: one row of facts, registered. Nothing in the package knows it."""

from __future__ import annotations

import dataclasses

import tiny
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.model.arch.families import FAMILIES
from qwen3_npu.model.arch.families.family import Family

FAMILIES["llama"] = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    title="Llama",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    fixed={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
)


def arch() -> Qwen3Arch:
    """A tiny Llama."""
    return dataclasses.replace(tiny.DENSE, model_type="llama", head_dim=8)
