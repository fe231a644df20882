"""Qwen3-MoE's router: megatron's top-k router without Transformer Engine, with losses that do not depend on the layout
or on padding, and with counts of the choices.

The balancing loss of a layer and a micro-batch is `experts * sum over experts of f * P` (arXiv:2101.03961), where f is
the share of the choices and P the mean probability of an expert, both over the tokens that are no padding. It is 1 if
experts are used evenly. transformers' `load_balancing_loss_func`, given one layer's logits and the attention mask, is
`num_experts_per_tok` times it. As in Megatron the losses of the layers are summed (transformers makes one loss of the
tokens of all layers), and those of the micro-batches of a step are averaged.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    get_tokens_per_expert_and_token_count,
    switch_load_balancing_loss_func,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig


class Router(TopKRouter):
    """Chooses the experts of each token.

    In megatron-core 0.16.1 `router_gating_linear` names `te_general_gemm`, which exists only with Transformer Engine:
    without it every MoE forward raises NameError. Hence `gating`.

    With gradients divided by the supervised tokens of the global batch, megatron weights both auxiliary losses by this
    rank's tokens: a sharded sequence makes them that many times weaker than one process has them, and tokens that are
    not supervised (padding, questions) many times stronger. Hence `routing` and `loss_weight`.

    Attributes:
        loss_weight: what the losses are multiplied by, because gradients are divided by the supervised tokens of the
            global batch afterwards; see `training.step.router_loss_weight`. 1 where they are not.
        tokens: [experts] int64, tokens sent to each expert since the last `take_counts`, as are the others.
        dropped: int64, choices that a capacity dropped.
        balance_loss: this rank's share of the balancing loss, before its coefficient, added up over micro-batches.
        micro_batches: this rank's share of those.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__(config, pg_collection)
        if not config.use_cpu_initialization:
            self.cuda(torch.cuda.current_device())  # megatron makes the weight on the host and leaves it there
        self.loss_weight: float | torch.Tensor = 1.0
        self.tokens = torch.zeros(config.num_moe_experts, dtype=torch.int64, device=self.weight.device)
        self.dropped = torch.zeros((), dtype=torch.int64, device=self.weight.device)
        self.balance_loss = torch.zeros((), device=self.weight.device)
        self.micro_batches = 0.0

    @property
    def has_losses(self) -> bool:
        """Whether it adds something to the loss."""
        return self.get_aux_loss_coeff("aux_loss") > 0 or bool(self.config.moe_z_loss_coeff)

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [s, b, experts], in the dtype that --moe-router-dtype asks for."""
        dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(self.config.moe_router_dtype, input.dtype)
        return torch.nn.functional.linear(input.to(dtype), self.weight.to(dtype))

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Router weights and choices, [tokens, experts] each, from logits [s, b, experts].

        Args:
            padding_mask: [s, b] bool, what is padding. It uses no capacity and is not counted.
        """
        logits = logits.view(-1, self.config.num_moe_experts)
        padding = None if padding_mask is None else padding_mask.reshape(-1)
        probs, routing_map = topk_routing_with_score_function(
            logits, self.topk, use_pre_softmax=self.config.moe_router_pre_softmax, score_function=self.score_function
        )
        chosen = routing_map if padding is None else routing_map & ~padding.unsqueeze(-1)
        has_capacity = self.config.moe_expert_capacity_factor is not None
        if has_capacity:
            probs, routing_map = self._drop(probs, chosen, padding)
        # A recomputed layer runs twice, the first time without gradients.
        if not (self.training and torch.is_grad_enabled()):
            return probs, routing_map
        if has_capacity:
            kept = routing_map & chosen  # with --moe-pad-expert-input-to-capacity the map has more
            self.dropped += chosen.sum() - kept.sum()
            chosen = kept
        self.tokens += chosen.sum(0)
        return self._with_losses(probs, logits, padding), routing_map

    def _drop(
        self, probs: torch.Tensor, chosen: torch.Tensor, padding: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and choices without those above the capacity, which the tokens that are no padding decide.

        Padded to the capacity, an expert's rows have one size on all ranks: there all tokens decide it.
        """
        config, factor = self.config, self.config.moe_expert_capacity_factor
        probs = probs * chosen
        if padding is None or config.moe_pad_expert_input_to_capacity:
            policy, padded = config.moe_token_drop_policy, config.moe_pad_expert_input_to_capacity
            return apply_router_token_dropping(probs, chosen, self.topk, factor, policy, padded)
        real = (~padding).sum()  # stays on the device, as does the capacity
        # A millionth below: float32 may end just above a whole number.
        capacity = (real * (self.topk * factor / config.num_moe_experts * (1 - 1e-6))).ceil()
        if config.moe_token_drop_policy == "position":
            place = chosen.cumsum(0) - 1
        else:
            place = probs.argsort(dim=0, descending=True).argsort(dim=0)
        chosen = chosen & (place < capacity)
        return probs * chosen, chosen

    def _with_losses(self, probs: torch.Tensor, logits: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """`probs` with the gradients of the balancing loss (see above) and of the z loss (arXiv:2202.08906), the mean
        of logsumexp(logits)^2. Each rank adds the share of its tokens; the ranks that share a micro-batch count it
        together.

        Args:
            logits: [tokens, experts].
            padding: [tokens] bool, or None.
        """
        balance, z = self.get_aux_loss_coeff("aux_loss"), self.config.moe_z_loss_coeff
        ranks = self.tp_cp_group.size()
        total: float | torch.Tensor = logits.shape[0] * ranks
        loss: torch.Tensor | None = None
        if balance > 0:
            chosen, scores = compute_routing_scores_for_aux_loss(
                logits, self.topk, self.score_function, padding_mask=padding
            )
            counts, _, total = get_tokens_per_expert_and_token_count(
                chosen, self.tp_cp_group, self.topk, with_padding_mask=padding is not None
            )
            loss = switch_load_balancing_loss_func(
                scores,
                counts,
                total,
                topk=self.topk,
                num_experts=self.config.num_moe_experts,
                moe_aux_loss_coeff=balance,
            )
            self.balance_loss += loss.detach() / balance
            self.micro_batches += 1 / ranks
        elif z and padding is not None:
            total = reduce_from_tensor_model_parallel_region((~padding).sum(), self.tp_cp_group)
        if z:
            squares = logits.float().logsumexp(-1).square()
            squares = squares if padding is None else squares * ~padding
            share = z * squares.sum() / total
            loss = share if loss is None else loss + share
        return probs if loss is None else MoEAuxLossAutoScaler.apply(probs, loss * self.loss_weight)

    def take_counts(self) -> torch.Tensor:
        """[experts + 3] float32: `tokens`, `dropped`, `balance_loss`, `micro_batches`; they are reset to 0."""
        micro_batches = torch.full_like(self.balance_loss, self.micro_batches)
        counts = [self.tokens.float(), torch.stack([self.dropped.float(), self.balance_loss, micro_batches])]
        for count in (self.tokens, self.dropped, self.balance_loss):
            count.zero_()
        self.micro_batches = 0.0
        return torch.cat(counts)


def routers(chunks: Iterable[torch.nn.Module]) -> list[Router]:
    """The routers of some model chunks."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]
