"""Qwen3-MoE's router: megatron's top-k router without Transformer Engine, with losses that do not depend on the layout,
and with counts of what it did.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig


class Router(TopKRouter):
    """Chooses the experts of each token.

    In megatron-core 0.16.1 `router_gating_linear` names `te_general_gemm`, which exists only with Transformer Engine:
    without it every MoE forward raises NameError. Hence `gating`.

    With gradients divided by the tokens of the global batch, megatron weights both auxiliary losses by this rank's
    tokens: cutting the sequence (sequence or context parallelism) makes them that many times weaker than one process
    has them. Hence `attach_and_log_load_balancing_loss` and `apply_z_loss`.

    Attributes:
        tokens: [experts] int64, tokens sent to each expert since the last `take_counts`, as are the others.
        choices: of experts by tokens; more than `tokens` where a capacity drops some.
        balance_loss: this rank's share of the balancing loss, before its coefficient, added up over micro-batches.
        micro_batches: this rank's share of those.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__(config, pg_collection)
        if not config.use_cpu_initialization:
            self.cuda(torch.cuda.current_device())  # megatron makes the weight on the host and leaves it there
        self.tokens = torch.zeros(config.num_moe_experts, dtype=torch.int64, device=self.weight.device)
        self.choices = 0
        self.balance_loss = torch.zeros((), device=self.weight.device)
        self.micro_batches = 0.0

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [s, b, experts], in the dtype that --moe-router-dtype asks for."""
        dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(self.config.moe_router_dtype, input.dtype)
        return torch.nn.functional.linear(input.to(dtype), self.weight.to(dtype))

    def routing(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As megatron's; counts."""
        probs, routing_map = super().routing(logits, *args, **kwargs)
        if self._is_training_pass():
            self.tokens += routing_map.sum(0)
            self.choices += routing_map.shape[0] * self.topk
        return probs, routing_map

    def _is_training_pass(self) -> bool:
        # A recomputed layer runs twice, the first time without gradients.
        return self.training and torch.is_grad_enabled()

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
        """Add the balancing loss to the graph, weighted by the tokens of all ranks that share a micro-batch."""
        self.balance_loss += aux_loss.detach() / aux_loss_coeff
        self.micro_batches += 1 / self.tp_cp_group.size()
        if not self.calculate_per_token_loss:
            return MoEAuxLossAutoScaler.apply(activation, aux_loss)
        local_tokens = activation.shape[0] if valid_token_count is None else valid_token_count
        return MoEAuxLossAutoScaler.apply(activation, aux_loss * local_tokens * self.tp_cp_group.size())

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Add coefficient * mean(logsumexp(logits)^2) to the graph (arXiv:2202.08906); logits [tokens, experts]."""
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not self._is_training_pass():
            return logits
        share = coefficient * logits.float().logsumexp(-1).square().sum()  # times the tokens that it is a mean over
        if not self.calculate_per_token_loss:
            share = share / (logits.shape[0] * self.tp_cp_group.size())
        return MoEAuxLossAutoScaler.apply(logits, share)

    def take_counts(self) -> torch.Tensor:
        """[experts + 3] float32: `tokens`, choices dropped, `balance_loss`, `micro_batches`; they begin again at 0."""
        dropped = self.choices - self.tokens.sum()
        micro_batches = torch.full_like(self.balance_loss, self.micro_batches)
        counts = torch.cat([self.tokens.float(), torch.stack([dropped.float(), self.balance_loss, micro_batches])])
        self.tokens.zero_()
        self.balance_loss.zero_()
        self.choices, self.micro_batches = 0, 0.0
        return counts
