"""Plain Llama, added from outside: one row of facts. Nothing in the package knows it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

import tiny
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.model.arch.families import FAMILIES
from qwen3_npu.model.arch.families.family import Family

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    title="Llama",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    fixed={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
)


def register() -> None:
    """For the rest of this process: what a user's own program does."""
    FAMILIES["llama"] = LLAMA


@contextlib.contextmanager
def registered(*, biased: bool = False) -> Iterator[Qwen3Arch]:
    """For a while; a tiny Llama. `biased`: the variant whose attention has biases everywhere."""
    variant = {"qkv_bias": True, "o_bias": True, "fixed": {**LLAMA.fixed, "attention_bias": (True,)}} if biased else {}
    with mock.patch.dict(FAMILIES, {"llama": dataclasses.replace(LLAMA, **variant)}):
        yield dataclasses.replace(tiny.DENSE, model_type="llama", head_dim=8)
