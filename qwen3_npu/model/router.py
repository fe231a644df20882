"""Qwen3-MoE's router: megatron's top-k router without Transformer Engine, with losses that do not depend on the layout
or on padding, and with counts of the choices.

The balancing loss of a layer and a micro-batch is `experts * sum over experts of f * P` (arXiv:2101.03961), where f is
the share of the choices and P the mean probability of an expert, both over the tokens that are no padding. It is 1 if
experts are used evenly. transformers' `load_balancing_loss_func`, given one layer's logits and the attention mask, is
`num_experts_per_tok` times it. As in Megatron the losses of the layers are summed (transformers makes one loss of the
tokens of all layers), and those of the micro-batches of a step are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    get_capacity,
    get_tokens_per_expert_and_token_count,
    switch_load_balancing_loss_func,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from qwen3_npu.kernels import reference
from qwen3_npu.model.modules import weight_gradient

_SEEN = 64  # most micro-batches whose counts are kept apart


def first_tokens(chosen: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` tokens of each expert, in their order; where it has fewer, the first others follow.

    An NPU's cores sort no integers; float32 is exact for these up to 2^23 tokens.

    Args:
        chosen: [tokens, experts] bool.

    Returns:
        [experts, count] int64.
    """
    earlier_is_higher = torch.arange(len(chosen), 0, -1, dtype=torch.float32, device=chosen.device)
    return (chosen.T * float(len(chosen)) + earlier_is_higher).topk(count, dim=1).indices


class _Gate(torch.autograd.Function):
    """Logits of the experts, and the hidden state itself, so that addmm also adds the gradient of its other uses."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, add_weight_gradient: Callable
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        ctx.weight, ctx.dtype, ctx.add_weight_gradient = weight, dtype, add_weight_gradient
        return torch.nn.functional.linear(x.to(dtype), weight.to(dtype)), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, grad_x: torch.Tensor) -> tuple:
        (x,), weight, dtype = ctx.saved_tensors, ctx.weight, ctx.dtype
        grad = grad.flatten(0, -2)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            if dtype == grad_x.dtype:
                dx = torch.addmm(grad_x.flatten(0, -2), grad, weight).view(grad_x.shape)
            else:
                dx = grad_x + (grad @ weight.to(dtype)).to(grad_x.dtype).view(grad_x.shape)
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(weight, x.flatten(0, -2).to(dtype), grad, ctx.add_weight_gradient)
        return dx, dw, None, None


class _Choice(torch.autograd.Function):
    """The choice of the experts of each token, and the balancing loss's gradient.

    The softmax over a token's chosen logits is a softmax over all logits where the others are -inf. So weights and map
    [tokens, experts] need no scatter, and their gradient needs no gather.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, router: Router, is_counted: bool, padding: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values, chosen = logits.topk(router.topk)
        alone = torch.full_like(logits, float("-inf")).scatter_(1, chosen, values)
        probs, routing_map = torch.softmax(alone, -1), alone != float("-inf")
        counts = routing_map.sum(0)
        ctx.mark_non_differentiable(routing_map, counts)
        ctx.set_materialize_grads(False)  # these two outputs have no gradient
        real, counted = None, counts
        if is_counted and padding is not None:
            real = ~padding.unsqueeze(-1)
            counted = (routing_map & real).sum(0)
        if is_counted:
            router.note(counted)
        ctx.router = router if is_counted and router.get_aux_loss_coeff("aux_loss") > 0 else None
        if ctx.router is None:
            ctx.save_for_backward(probs)
        else:
            ctx.save_for_backward(probs, logits, router.counts_of_all(counted).float(), real)
        return probs, routing_map, counts

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: None) -> tuple:
        probs, *balanced = ctx.saved_tensors
        d_logits = torch._softmax_backward_data(grad, probs, -1, probs.dtype)
        if ctx.router is not None:
            d_logits.addcmul_(*ctx.router.balance_gradient(*balanced))
        return d_logits, None, None, None


class Router(TopKRouter):
    """Chooses the experts of each token.

    In megatron-core 0.16.1 `router_gating_linear` names `te_general_gemm`, which exists only with Transformer Engine:
    without it every MoE forward raises NameError. Hence `gating`.

    With gradients divided by the supervised tokens of the global batch, megatron weights both auxiliary losses by this
    rank's tokens: a sharded sequence makes them that many times weaker than one process has them, and tokens that are
    not supervised (padding, questions) many times stronger. Hence `routing` and `loss_weight`.

    Attributes:
        loss_weight: factor of the losses, because gradients are divided by the supervised tokens of the global batch
            afterwards; see `training.step.router_loss_weight`. 1 if they are not.
        tokens: [experts] int64, tokens sent to each expert since the last `take_counts`, as are the others; without
            `seen`, those of the last micro-batches, whose sum is made outside of the layer.
        dropped: int64, choices dropped because of the capacity.
        balance_loss: this rank's share of the balancing loss, before its coefficient, added up over micro-batches.
        balance_rows: the same before the sum over tokens, [tokens of a micro-batch].
        micro_batches: this rank's share of the number of micro-batches.
        hidden, counts: of the last micro-batch: its input, for the dispatcher (see `_Gate`), and the tokens of each
            expert, padding included, [experts] int64; None if a capacity may drop some.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        add_weight_gradient: Callable = reference.add_weight_gradient,
    ) -> None:
        super().__init__(config, pg_collection)
        self.add_weight_gradient = add_weight_gradient
        if not config.use_cpu_initialization:
            self.cuda(torch.cuda.current_device())  # megatron makes the weight on the host and leaves it there
        self.loss_weight: float | torch.Tensor = 1.0
        self.tokens = torch.zeros(config.num_moe_experts, dtype=torch.int64, device=self.weight.device)
        self.seen: list[torch.Tensor] = []
        self.dropped = torch.zeros((), dtype=torch.int64, device=self.weight.device)
        self.balance_loss = torch.zeros((), device=self.weight.device)
        self.balance_rows = torch.zeros(0, device=self.weight.device)
        self.micro_batches = 0.0
        self.hidden: torch.Tensor | None = None
        self.counts: torch.Tensor | None = None

    @property
    def has_losses(self) -> bool:
        """Whether it has an auxiliary loss."""
        return self.get_aux_loss_coeff("aux_loss") > 0 or bool(self.config.moe_z_loss_coeff)

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [s, b, experts], in the dtype that --moe-router-dtype asks for."""
        dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(self.config.moe_router_dtype, input.dtype)
        logits, self.hidden = _Gate.apply(input, self.weight, dtype, self.add_weight_gradient)
        return logits

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Router weights and choices, [tokens, experts] each, from logits [s, b, experts].

        Args:
            padding_mask: [s, b] bool, true for padding. Padding uses no capacity and is not counted.
        """
        logits = logits.view(-1, self.config.num_moe_experts)
        padding = None if padding_mask is None else padding_mask.reshape(-1)
        # A recomputed layer runs twice, the first time without gradients.
        is_counted = self.training and torch.is_grad_enabled()
        if self.is_plain:
            probs, routing_map, self.counts = _Choice.apply(logits, self, is_counted, padding)
            return probs, routing_map
        self.counts = None
        probs, routing_map = topk_routing_with_score_function(
            logits, self.topk, use_pre_softmax=self.config.moe_router_pre_softmax, score_function=self.score_function
        )
        chosen = routing_map if padding is None else routing_map & ~padding.unsqueeze(-1)
        has_capacity = self.config.moe_expert_capacity_factor is not None
        if has_capacity:
            probs, routing_map = self._drop(probs, chosen, padding)
        if not is_counted:
            return probs, routing_map
        if has_capacity:
            kept = routing_map & chosen  # with --moe-pad-expert-input-to-capacity the map has more
            self.dropped += chosen.sum() - kept.sum()
            chosen = kept
        self.note(chosen.sum(0))
        return self._with_losses(probs, logits, padding), routing_map

    @property
    def is_plain(self) -> bool:
        """Whether the choice is `_Choice`'s: no capacity, no z loss, weights by a softmax over the chosen."""
        config = self.config
        is_softmax = self.score_function == "softmax" and not config.moe_router_pre_softmax
        return is_softmax and config.moe_expert_capacity_factor is None and not config.moe_z_loss_coeff

    def counts_of_all(self, counts: torch.Tensor) -> torch.Tensor:
        """Tokens of each expert in the whole micro-batch; a rank may hold a part of it."""
        if self.tp_cp_group.size() == 1:
            return counts
        counts = counts.clone()
        dist.all_reduce(counts, group=self.tp_cp_group)
        return counts

    def balance_gradient(
        self, logits: torch.Tensor, counts: torch.Tensor, real: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two factors of the balancing loss's gradient; its value is added to `balance_rows`.

        Args:
            logits: [tokens, experts] of this rank; counts: `counts_of_all`, float32.
            real: [tokens, 1] bool, false for padding; None: no padding.

        Returns:
            [tokens, experts] float32, and its weight, a scalar or [tokens, 1].
        """
        config, ranks = self.config, self.tp_cp_group.size()
        coefficient = self.get_aux_loss_coeff("aux_loss")
        scores = torch.softmax(logits, -1, dtype=torch.float32)
        if len(self.balance_rows) != len(logits):
            self.balance_loss += self.balance_rows.sum()
            self.balance_rows = scores.new_zeros(len(logits))
        self.micro_batches += 1 / ranks
        gradient = torch._softmax_backward_data(counts.expand_as(scores), scores, -1, torch.float32)
        if real is None:
            total = len(logits) * ranks
            factor = config.num_moe_experts / (self.topk * total * total)
            self.balance_rows.addmv_(scores, counts, alpha=factor)
            return gradient, _weight(factor * coefficient, self.loss_weight, gradient.device)
        # The tokens that count are known on the device only: each was counted `topk` times.
        factors = real / counts.sum().square() * float(config.num_moe_experts * self.topk)
        self.balance_rows.addcmul_(scores.mv(counts), factors.squeeze(-1))
        return gradient, factors * _weight(coefficient, self.loss_weight, gradient.device)

    def _drop(
        self, probs: torch.Tensor, chosen: torch.Tensor, padding: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and choices without those above the capacity. Tokens that are no padding determine the capacity.

        With --moe-pad-expert-input-to-capacity all tokens determine it, so that all ranks have the same number of rows.
        """
        config, factor = self.config, self.config.moe_expert_capacity_factor
        probs = probs * chosen
        policy, pads = config.moe_token_drop_policy, config.moe_pad_expert_input_to_capacity
        if policy == "probs" and (pads or padding is None):
            return apply_router_token_dropping(probs, chosen, self.topk, factor, policy, pads)
        if pads:
            capacity = get_capacity(len(chosen) * self.topk, config.num_moe_experts, factor)
            kept = torch.zeros_like(probs).scatter_(0, first_tokens(chosen, capacity).T, 1.0).bool()
            return probs * kept, kept
        # For the policy "position" megatron sorts integers, which an NPU's cores do not.
        real = len(probs) if padding is None else (~padding).sum()  # stays on the device, as does the capacity
        # A millionth less, since float32 may end just above a whole number.
        most = real * (self.topk * factor / config.num_moe_experts * (1 - 1e-6))
        capacity = most.ceil() if isinstance(most, torch.Tensor) else math.ceil(most)
        if policy == "position":
            place = chosen.cumsum(0, dtype=torch.int32) - 1
        else:
            # The place of each token in its expert's order. An NPU's cores sort no integers.
            order = probs.argsort(dim=0, descending=True)
            numbers = torch.arange(len(order), dtype=torch.int32, device=order.device).unsqueeze(1)
            place = torch.empty_like(order, dtype=torch.int32).scatter_(0, order, numbers.expand_as(order))
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

    def note(self, counts: torch.Tensor) -> None:
        """Tokens of each expert in a micro-batch, [experts] int64, for `take_counts`."""
        self.seen.append(counts)
        if len(self.seen) == _SEEN:
            self._add_up()

    def _add_up(self) -> None:
        if self.seen:
            self.tokens += torch.stack(self.seen).sum(0)
            self.seen.clear()

    def take_counts(self) -> torch.Tensor:
        """[experts + 3] float32: `tokens`, `dropped`, `balance_loss`, `micro_batches`; they are reset to 0."""
        micro_batches = torch.full_like(self.balance_loss, self.micro_batches)
        balance_loss = self.balance_loss + self.balance_rows.sum()
        self._add_up()
        counts = [self.tokens.float(), torch.stack([self.dropped.float(), balance_loss, micro_batches])]
        for count in (self.tokens, self.dropped, self.balance_loss, self.balance_rows):
            count.zero_()
        self.micro_batches = 0.0
        return torch.cat(counts)


# The weight of the last balancing loss's gradient, which the layers of a micro-batch share.
_weights: dict[tuple, tuple[torch.Tensor, object]] = {}


def _weight(factor: float, loss_weight: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    """factor x loss_weight x the scale that megatron's schedule tells the auxiliary losses, a scalar on the device."""
    scale = MoEAuxLossAutoScaler.main_loss_backward_scale
    version = None if scale is None else scale._version  # megatron writes new scales into the same tensor
    key = factor, id(loss_weight), id(scale), version, device
    if key not in _weights:
        _weights.clear()
        weight = loss_weight * factor
        if not isinstance(weight, torch.Tensor):
            weight = torch.full((), weight, device=device)
        _weights[key] = weight if scale is None else weight * scale, (loss_weight, scale)
    return _weights[key][0]


def routers(chunks: Iterable[torch.nn.Module]) -> list[Router]:
    """The routers of some model chunks."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]
