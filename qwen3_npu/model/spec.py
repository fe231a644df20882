"""The model as a tree of choices: one ModuleSpec for every device; the device shows only in the kernels."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from qwen3_npu.distributed.layout import NOOP
from qwen3_npu.kernels import Kernels
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.model.attention import AttentionSubmodules, SelfAttention
from qwen3_npu.model.experts import GroupedExperts
from qwen3_npu.model.modules import NoopLayer, RMSNorm, Router, SwiGLU


def layer_spec(arch: Qwen3Arch, kernels: Kernels) -> ModuleSpec:
    """One Qwen3 layer."""
    norm = ModuleSpec(RMSNorm, params={"kernel": kernels.rms_norm})
    attention = ModuleSpec(
        SelfAttention,
        params={"kernels": kernels},
        submodules=AttentionSubmodules(
            linear_qkv=ColumnParallelLinear, linear_proj=RowParallelLinear, q_layernorm=norm, k_layernorm=norm
        ),
    )
    return ModuleSpec(
        TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=_experts(kernels) if arch.is_moe else _mlp(arch, kernels),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(arch: Qwen3Arch, kernels: Kernels, layers: Sequence[int]) -> TransformerBlockSubmodules:
    """The layers of one model chunk, `NOOP` for an empty place, and the final norm."""
    layer, noop = layer_spec(arch, kernels), ModuleSpec(NoopLayer)
    return TransformerBlockSubmodules(
        layer_specs=[noop if number == NOOP else layer for number in layers],
        layer_norm=ModuleSpec(RMSNorm, params={"kernel": kernels.rms_norm}),
    )


def _mlp(arch: Qwen3Arch, kernels: Kernels) -> ModuleSpec:
    return ModuleSpec(
        MLP,
        params={"ffn_hidden_size": arch.intermediate_size},
        submodules=MLPSubmodules(
            linear_fc1=ColumnParallelLinear,
            linear_fc2=RowParallelLinear,
            activation_func=ModuleSpec(SwiGLU, params={"kernel": kernels.swiglu}),
        ),
    )


def _experts(kernels: Kernels) -> ModuleSpec:
    experts = ModuleSpec(GroupedExperts, params={"kernels": kernels})
    return ModuleSpec(MoELayer, submodules=MoESubmodules(experts=experts, router=Router))
