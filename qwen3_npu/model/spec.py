"""One ModuleSpec for every device; only the kernels differ between devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerLayerSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from qwen3_npu.args.lora import LoraArgs, has_target
from qwen3_npu.args.rules.swapping import Swapping
from qwen3_npu.distributed.context_parallel import ContextParallel
from qwen3_npu.distributed.layout import NOOP
from qwen3_npu.distributed.tensor_parallel.linears import OVERLAPPED
from qwen3_npu.distributed.tensor_parallel.products import Overlap
from qwen3_npu.kernels import Kernels
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.model.attention import AttentionSubmodules, SelfAttention
from qwen3_npu.model.dispatcher import MoE
from qwen3_npu.model.experts import GroupedExperts
from qwen3_npu.model.lora.experts import LoraExperts
from qwen3_npu.model.lora.linear import LoraLinear
from qwen3_npu.model.modules import DenseMLP, Layer, NoopLayer, RMSNorm, SwiGLU, add_to_residual
from qwen3_npu.model.quantized import NF4_LINEARS
from qwen3_npu.model.router import Router


@dataclasses.dataclass(frozen=True)
class Parts:
    """Settings and parts of the layers.

    Attributes:
        context_parallel: the algorithm of attention if a rank holds a part of the sequence.
        overlap: how communication of tensor parallelism is hidden behind products.
        recompute_activation: recompute the MLP's activation in backward instead of keeping it.
        recompute_products: experts recompute their first product, too (--moe-zero-memory level0).
        hides_exchange: hide the exchange of experts behind products (--moe-alltoall-overlap-comm).
        swapping: activations that wait on the host for backward; None: none.
        loss_chunk: tokens whose logits exist at the same time; 0: all.
        seed: of a reward model's new head.
    """

    kernels: Kernels
    lora: LoraArgs = dataclasses.field(default_factory=LoraArgs)
    context_parallel: ContextParallel | None = None
    overlap: Overlap | None = None
    recompute_activation: bool = False
    recompute_products: bool = False
    hides_exchange: bool = False
    swapping: Swapping | None = None
    loss_chunk: int = 0
    seed: int = 0


def layer_spec(arch: Qwen3Arch, parts: Parts, adapted: Collection[str] = ()) -> ModuleSpec:
    """One layer; `adapted`: its linears that have an adapter."""
    kernels = parts.kernels
    norm = _norm(kernels)
    attention = ModuleSpec(
        SelfAttention,
        params={
            "kernels": kernels,
            "context_parallel": parts.context_parallel,
            "output_bias": arch.family.o_bias,
        },
        submodules=AttentionSubmodules(
            linear_qkv=_linear("linear_qkv", ColumnParallelLinear, parts, adapted),
            linear_proj=_linear("linear_proj", RowParallelLinear, parts, adapted),
            q_layernorm=norm if arch.family.qk_norm else IdentityOp,
            k_layernorm=norm if arch.family.qk_norm else IdentityOp,
        ),
    )
    return ModuleSpec(
        Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=add_to_residual,
            pre_mlp_layernorm=norm,
            mlp=_experts(parts, adapted) if arch.is_moe else _mlp(arch, parts, adapted),
            mlp_bda=add_to_residual,
        ),
    )


def block_spec(arch: Qwen3Arch, parts: Parts, layers: Sequence[int]) -> TransformerBlockSubmodules:
    """The layers of one model chunk, `NOOP` for a no-op layer, and the final norm."""
    targets, some = parts.lora.places(arch)
    specs: dict[tuple[str, ...], ModuleSpec] = {}
    noop, found = ModuleSpec(NoopLayer), []
    for number in layers:
        adapted = tuple(target for target in targets if has_target(targets, some, target, number))
        if number != NOOP and adapted not in specs:
            specs[adapted] = layer_spec(arch, parts, adapted)
        found.append(noop if number == NOOP else specs[adapted])
    return TransformerBlockSubmodules(
        layer_specs=found,
        layer_norm=_norm(parts.kernels),
    )


def _norm(kernels: Kernels) -> ModuleSpec:
    return ModuleSpec(RMSNorm, params={"kernel": kernels.rms_norm, "add_kernel": kernels.add_rms_norm})


def _linear(name: str, linear: type, parts: Parts, adapted: Collection[str]) -> ModuleSpec:
    linear = NF4_LINEARS[linear] if parts.lora.qlora else linear
    params: dict[str, object] = {"is_double": True} if parts.lora.qlora_double_quant else {}
    if parts.overlap is not None:
        linear, params = OVERLAPPED[linear], {"overlap": parts.overlap}
    if name in adapted:
        made, add = functools.partial(linear, **params), parts.kernels.add_weight_gradient
        return ModuleSpec(LoraLinear, params={"linear": made, "args": parts.lora, "add_weight_gradient": add})
    return ModuleSpec(linear, params=params)


def _mlp(arch: Qwen3Arch, parts: Parts, adapted: Collection[str]) -> ModuleSpec:
    return ModuleSpec(
        DenseMLP,
        params={"ffn_hidden_size": arch.intermediate_size, "recompute": parts.recompute_activation},
        submodules=MLPSubmodules(
            linear_fc1=_linear("linear_fc1", ColumnParallelLinear, parts, adapted),
            linear_fc2=_linear("linear_fc2", RowParallelLinear, parts, adapted),
            activation_func=ModuleSpec(SwiGLU, params={"kernel": parts.kernels.swiglu}),
        ),
    )


def _experts(parts: Parts, adapted: Collection[str]) -> ModuleSpec:
    params: dict[str, object] = {
        "kernels": parts.kernels,
        "recompute_activation": parts.recompute_activation,
        "quantize": parts.lora.qlora,
        "double_quantize": parts.lora.qlora_double_quant,
        "recompute_products": parts.recompute_products,
    }
    experts = ModuleSpec(GroupedExperts, params=params)
    if {"linear_fc1", "linear_fc2"} & set(adapted):
        experts = ModuleSpec(LoraExperts, params={**params, "args": parts.lora, "adapted": adapted})
    router = functools.partial(Router, add_weight_gradient=parts.kernels.add_weight_gradient)
    submodules = MoESubmodules(experts=experts, router=router)
    return ModuleSpec(
        MoE, params={"kernels": parts.kernels, "hides_exchange": parts.hides_exchange}, submodules=submodules
    )
