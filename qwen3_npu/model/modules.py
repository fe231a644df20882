"""Small modules of the layer: norm, activation, router, and a layer that is not there. Each calls one kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from megatron.core.utils import get_pg_rank


class RMSNorm(torch.nn.Module):
    """RMSNorm that works under sequence parallelism (megatron's own refuses it without Transformer Engine).

    The weight is replicated over TP; its `sequence_parallel` mark makes megatron sum its gradient.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, *, kernel: Callable, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel
        self.kernel, self.eps = kernel, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel(x, self.weight, self.eps)


class SwiGLU(torch.nn.Module):
    """The MLP's activation: [..., 2 ffn] -> [..., ffn]."""

    def __init__(self, config: TransformerConfig, *, kernel: Callable) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel(x)


class Router(TopKRouter):
    """megatron's top-k router with a gate that does not need Transformer Engine.

    In megatron-core 0.16.1 `router_gating_linear` names `te_general_gemm`, which exists only with Transformer Engine:
    without it every MoE forward raises NameError.
    """

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [s, b, experts], in the dtype that --moe-router-dtype asks for."""
        dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(self.config.moe_router_dtype, input.dtype)
        return torch.nn.functional.linear(input.to(dtype), self.weight.to(dtype))

    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        aux_loss_coeff: float,
        aux_loss: torch.Tensor,
        aux_loss_name: str,
        reduce_group: Any,
        reduce_group_has_dp: bool = False,
        valid_token_count: Any = None,
    ) -> torch.Tensor:
        """As megatron's, with the balancing loss weighted by the tokens of all ranks that share a micro-batch.

        megatron-core 0.16.1 weights it by this rank's tokens, so cutting the sequence (sequence or context
        parallelism) makes it that many times weaker than one process has it.
        """
        local_tokens = activation.shape[0] if valid_token_count is None else valid_token_count
        return super().attach_and_log_load_balancing_loss(
            activation,
            aux_loss_coeff,
            aux_loss,
            aux_loss_name,
            reduce_group,
            reduce_group_has_dp,
            local_tokens * self.tp_cp_group.size(),
        )


class NoopLayer(MegatronModule, BaseTransformerLayer):
    """A place in the pipeline that holds no weights and changes nothing (--noop-layers)."""

    def __init__(
        self, config: TransformerConfig, layer_number: int = 1, pg_collection: Any = None, vp_stage: int | None = None
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, get_pg_rank(pg_collection.pp))

    def forward(self, hidden_states: torch.Tensor, context: Any = None, **_: Any) -> tuple[torch.Tensor, Any]:
        return hidden_states, context
