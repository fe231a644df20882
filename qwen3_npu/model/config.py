"""Qwen3Arch and flags -> megatron's TransformerConfig."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from qwen3_npu.args.parallel import ParallelArgs
from qwen3_npu.args.training import TrainArgs
from qwen3_npu.distributed.interleave import interleave_passes
from qwen3_npu.distributed.layout import Layout
from qwen3_npu.model.arch import Qwen3Arch


def transformer_config(
    arch: Qwen3Arch,
    layout: Layout,
    parallel: ParallelArgs,
    train: TrainArgs,
    *,
    variable_lengths: bool = False,
    overlaps_p2p_safely: bool,
    interleaved: bool = False,
) -> TransformerConfig:
    """The configuration of every module.

    Args:
        variable_lengths: micro-batches differ in length.
        overlaps_p2p_safely: see `Platform`.
        interleaved: passes of two micro-batches hide each other's exchange of experts, if there is one.
    """
    dtype = torch.bfloat16 if train.bf16 else torch.float32
    config: dict[str, object] = {
        "num_layers": layout.num_layers,
        **_shapes(arch),
        "attention_dropout": train.attention_dropout,
        "hidden_dropout": train.hidden_dropout,
        "init_method_std": train.init_method_std,
        "transformer_impl": "local",
        # megatron's fusions need Transformer Engine, apex or torch.compile; ours are the kernels.
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "bf16": train.bf16,
        "params_dtype": dtype,
        "fp32_residual_connection": train.fp32_residual_connection,
        "pipeline_dtype": torch.float32 if train.fp32_residual_connection else dtype,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual if layout.virtual > 1 else None,
        "context_parallel_size": parallel.context_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
        # "token": gradients are divided by the supervised tokens of the global batch, the only rule under which one
        # process and many compute the same thing however the batch is divided.
        "calculate_per_token_loss": train.loss_normalization == "token",
        "variable_seq_lengths": variable_lengths,
        "moe_token_dispatcher_type": train.moe_token_dispatcher_type.removesuffix("_seq"),
        **_recompute(train),
        **_between_stages(layout, parallel),
        "deallocate_pipeline_outputs": overlaps_p2p_safely,
    }
    if arch.is_moe:
        config |= _moe(arch, train)
    made = TransformerConfig(**config)
    if interleaved and layout.expert > 1:
        interleave_passes(made)
    return made


def _shapes(arch: Qwen3Arch) -> dict[str, object]:
    """The shapes of the model."""
    return {
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.intermediate_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_key_value_heads,
        "kv_channels": arch.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.rms_norm_eps,
        "qk_layernorm": arch.family.qk_norm,  # makes megatron sum the gradients of q_layernorm and k_layernorm over TP
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "use_te_activation_func": True,  # the MLP's activation is the module that the spec names
        "add_bias_linear": False,
        "add_qkv_bias": arch.family.qkv_bias,
    }


def _recompute(train: TrainArgs) -> dict[str, object]:
    """Settings of recomputation in backward. That of the activation function is in `model/spec.py`."""
    granularity, modules = train.recompute_granularity, list(train.recompute_modules)
    if train.swap_attention and granularity != "selective":  # instead of whole layers, as `args.rules.swapping` says
        granularity = None
    if granularity != "full" and train.recompute_norm:  # full recomputes the norms anyway
        modules = [*(modules if granularity else ()), "layernorm"]
        granularity = "selective"
    if granularity != "full" and train.moe_zero_memory == "level1":
        modules = sorted({*(modules if granularity else ()), "moe"})
        granularity = "selective"
    return {
        "recompute_granularity": granularity,
        "recompute_method": None if train.swap_attention else train.recompute_method,
        "recompute_num_layers": None if train.swap_attention else train.recompute_num_layers,
        "recompute_modules": modules,
    }


def _between_stages(layout: Layout, parallel: ParallelArgs) -> dict[str, object]:
    """What each pipeline stage holds, and how stages exchange."""
    stages: dict[str, object] = {"pipeline_model_parallel_layout": _stages(layout)} if layout.pipeline > 1 else {}
    # After each batched exchange megatron makes the host wait for the whole device, against a bug of torch before 1.13.
    stages |= {"batch_p2p_comm": parallel.batches_p2p, "batch_p2p_sync": False}
    if layout.virtual > 1:
        assert not parallel.batches_p2p
        stages |= {"overlap_p2p_comm": True}
    return stages


def _stages(layout: Layout) -> list[list[str]]:
    """megatron's pipeline layout: the layers of each model chunk, virtual chunk slowest."""
    stages = [["decoder"] * len(stage[v]) for v in range(layout.virtual) for stage in layout.chunks]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def _moe(arch: Qwen3Arch, train: TrainArgs) -> dict[str, object]:
    coefficient = arch.router_aux_loss_coef if train.moe_aux_loss_coeff is None else train.moe_aux_loss_coeff
    balanced = train.moe_router_load_balancing_type == "aux_loss" and coefficient > 0
    return {
        "num_moe_experts": arch.num_experts,
        "moe_router_topk": arch.num_experts_per_tok,
        "moe_ffn_hidden_size": arch.moe_intermediate_size,
        # Softmax over the chosen experts equals softmax over all of them, chosen ones divided by their sum.
        "moe_router_pre_softmax": not arch.norm_topk_prob,
        "moe_router_load_balancing_type": "aux_loss" if balanced else "none",
        "moe_aux_loss_coeff": coefficient if balanced else 0.0,
        "moe_router_dtype": train.moe_router_dtype,
        "moe_z_loss_coeff": train.moe_z_loss_coeff,
        "moe_expert_capacity_factor": train.moe_expert_capacity_factor,
        "moe_token_drop_policy": train.moe_token_drop_policy,
        "moe_pad_expert_input_to_capacity": train.moe_pad_expert_input_to_capacity,
    }
