"""The `args` namespace inside a Megatron checkpoint: written from, and read back to, architecture and layout.

Megatron's loader compares num_layers, hidden_size, num_attention_heads, add_position_embedding and the parallel sizes;
MindSpeed-LLM's converters read the rest. `num_query_groups` and `num_key_value_heads` are both written: MindSpeed-LLM's
converter back to Hugging Face takes the heads from the second, which its own training never sets.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from qwen3_npu.checkpoint.binary.dtypes import DType
from qwen3_npu.checkpoint.mapping.lora import Lora, found_lora
from qwen3_npu.distributed.layout import Layout, plan
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.numbers import number_list

ITERATION = 1  # of a converted checkpoint, as MindSpeed-LLM writes it: loaders treat 0 and "release" specially
CHECKPOINT_VERSION = 3.0  # Megatron's checkpoint_version


def to_args(arch: Qwen3Arch, layout: Layout, dtype: DType) -> dict[str, Any]:
    """Megatron's argument names and values for this model in this layout."""
    noop = layout.noop_layers
    uneven = len({len(chunk) for stage in layout.chunks for chunk in stage}) > 1
    args: dict[str, Any] = {
        "num_layers": layout.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.intermediate_size,
        "num_attention_heads": arch.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": arch.num_key_value_heads,
        "num_key_value_heads": arch.num_key_value_heads,
        "kv_channels": arch.head_dim,
        "max_position_embeddings": arch.max_position_embeddings,
        "rotary_base": arch.rope_theta,
        "norm_epsilon": arch.rms_norm_eps,
        "vocab_size": arch.vocab_size,
        "padded_vocab_size": layout.padded_vocab_size,
        "make_vocab_size_divisible_by": 1,
        "untie_embeddings_and_output_weights": not arch.tie_word_embeddings,
        "add_position_embedding": True,
        "use_rotary_position_embeddings": True,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "qk_layernorm": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "tokenizer_type": "PretrainedFromHF",
        "transformer_impl": "local",
        "params_dtype": dtype,
        "bf16": dtype.torch == "bfloat16",
        "fp16": dtype.torch == "float16",
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual if layout.virtual > 1 else None,
        "num_layers_per_virtual_pipeline_stage": len(layout.chunks[0][0]) if layout.virtual > 1 else None,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
        "context_parallel_size": 1,
        "noop_layers": ",".join(map(str, noop)) if noop else None,
        "num_layer_list": ",".join(str(len(stage[0])) for stage in layout.chunks) if uneven else None,
        "bos_token_id": arch.bos_token_id,
        "eos_token_id": arch.eos_token_id,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    if arch.is_moe:
        args |= {
            "num_experts": arch.num_experts,
            "moe_router_topk": arch.num_experts_per_tok,
            "moe_ffn_hidden_size": arch.moe_intermediate_size,
            "norm_topk_prob": arch.norm_topk_prob,
            "moe_aux_loss_coeff": arch.router_aux_loss_coef,
            "moe_grouped_gemm": layout.stacked_experts,
        }
    return args


def arch_from_args(args: argparse.Namespace, where: str) -> Qwen3Arch:
    """The architecture that a checkpoint's arguments describe (Megatron's or MindSpeed-LLM's own).

    Raises:
        UsageError: a fact is missing; `where` names the file.
    """

    def get(*names: str, default: Any = None) -> Any:
        for name in names:
            if getattr(args, name, None) is not None:
                return getattr(args, name)
        if default is not None:
            return default
        raise UsageError(f"{where}: its args have no {names[0]}; give the architecture with --hf-cfg-dir")

    heads, hidden = get("num_attention_heads"), get("hidden_size")
    experts: dict[str, Any] = {}
    if getattr(args, "num_experts", None) or getattr(args, "num_moe_experts", None):
        experts = {
            "num_experts": get("num_experts", "num_moe_experts"),
            "num_experts_per_tok": get("moe_router_topk", "num_experts_per_tok"),
            "moe_intermediate_size": get("moe_ffn_hidden_size", "moe_intermediate_size"),
            # Megatron's own trainings have no such argument; all published Qwen3-MoE normalise.
            "norm_topk_prob": bool(getattr(args, "norm_topk_prob", True)),
        }
    return Qwen3Arch(
        vocab_size=get("vocab_size", "padded_vocab_size"),
        hidden_size=hidden,
        intermediate_size=get("ffn_hidden_size", "intermediate_size"),
        num_hidden_layers=get("num_layers") - len(number_list(getattr(args, "noop_layers", None))),
        num_attention_heads=heads,
        num_key_value_heads=get("num_query_groups", "num_key_value_heads", default=heads),
        head_dim=get("kv_channels", "head_dim", default=hidden // heads),
        tie_word_embeddings=not get("untie_embeddings_and_output_weights", default=False),
        max_position_embeddings=get("max_position_embeddings", default=40960),
        rope_theta=float(get("rotary_base", "rope_theta", default=1_000_000.0)),
        rms_norm_eps=float(get("norm_epsilon", "layernorm_epsilon", default=1e-6)),
        bos_token_id=getattr(args, "bos_token_id", 151643),
        eos_token_id=getattr(args, "eos_token_id", 151645),
        **experts,
    )


def layout_from_args(
    args: argparse.Namespace,
    arch: Qwen3Arch,
    *,
    padded_vocab_size: int,
    virtual: int,
    stacked_experts: bool,
    expert_tensor: int | None = None,
) -> Layout:
    """The layout that a checkpoint's arguments describe.

    Args:
        padded_vocab_size, virtual, stacked_experts: read off the tensors themselves, which cannot be wrong.
        expert_tensor: the same, if there are expert tensors (MindSpeed-LLM's converter does not save it).
    """
    pipeline = getattr(args, "pipeline_model_parallel_size", 1)
    noop = number_list(getattr(args, "noop_layers", None))
    layer_list = number_list(getattr(args, "num_layer_list", None))
    total = arch.num_hidden_layers + len(noop)
    return plan(
        arch,
        tensor=getattr(args, "tensor_model_parallel_size", 1),
        pipeline=pipeline,
        expert=getattr(args, "expert_model_parallel_size", None) or 1,
        expert_tensor=expert_tensor or getattr(args, "expert_tensor_parallel_size", None),
        layers_per_virtual_stage=total // pipeline // virtual if virtual > 1 else None,
        num_layer_list=layer_list or None,
        noop_layers=noop,
        padded_vocab_size=padded_vocab_size,
        stacked_experts=stacked_experts,
    )


def lora_args(lora: Lora) -> dict[str, Any]:
    """What the args of a checkpoint with LoRA tensors say about them."""
    return {"lora_r": lora.r, "lora_alpha": lora.alpha, "lora_target_modules": list(lora.targets)}


def lora_from_args(
    args: argparse.Namespace, shapes: Mapping[str, tuple[int, ...]], alpha: float | None, where: str
) -> Lora | None:
    """The adapter among Megatron tensors of these shapes, or None. Rank and targets are read off the tensors.

    Args:
        alpha: used if the arguments do not say it.

    Raises:
        UsageError: alpha is said nowhere.
    """
    if (found := found_lora(shapes, where)) is None:
        return None
    saved = getattr(args, "lora_alpha", None)
    alpha = alpha if saved is None else float(saved)
    if alpha is None:
        raise UsageError(f"{where} holds LoRA tensors but its args have no lora_alpha; give --lora-alpha")
    r, targets = found
    return Lora(r, alpha, targets)
