"""The MoE layer with our kernels where tokens are copied to their experts and added up again."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection, maybe_move_tensor_to_cpu
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from qwen3_npu.kernels import Kernels


class Dispatcher(MoEAlltoAllTokenDispatcher):
    """megatron's all-to-all dispatcher; `permute` and `unpermute` are kernels, and the host waits once at most.

    Both need the same number of experts for every token: with a capacity (tokens are dropped) megatron's own serve.
    The counts of the experts stay on the device, where the grouped products read them. The host needs to know only how
    many rows it sends and receives: nothing if this rank has all experts, else one copy, made during the permute.
    """

    def __init__(self, *sizes: object, kernels: Kernels, **options: object) -> None:
        super().__init__(*sizes, **options)
        self.kernels = kernels
        self.known_counts: torch.Tensor | None = None
        self.is_even = self.config.moe_expert_capacity_factor is None
        self.is_alone = self.is_even and self.ep_size * self.tp_size == 1

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Tokens of each of this rank's experts, [experts] int64 on the device, from [t, all experts] bool."""
        if not self.is_even:
            return super().preprocess(routing_map)
        counts = routing_map.sum(0) if self.known_counts is None else self.known_counts
        self.num_out_tokens = len(routing_map) * self.config.moe_router_topk
        if self.is_alone:
            return counts
        everyone = counts.new_empty(self.ep_size, self.tp_size, self.num_experts)
        dist.all_gather_into_tensor(everyone.view(-1), counts, group=self.tp_ep_group)
        stream = self.cuda_dtoh_stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.everyones_counts = maybe_move_tensor_to_cpu(everyone, record_stream=True)
        self.d2h_event = stream.record_event()
        return self._of_my_experts(everyone).sum((0, 1))

    def _of_my_experts(self, everyone: torch.Tensor) -> torch.Tensor:
        return everyone[..., self.local_expert_indices[0] : self.local_expert_indices[-1] + 1]

    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """megatron's hook for waits; before the exchange the host must know its sizes."""
        if not self.is_even:
            return super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        if point == "before_ep_alltoall" and not self.is_alone:
            self.d2h_event.synchronize()
            mine = self.everyones_counts[self.ep_group.rank(), self.tp_rank]
            theirs = self._of_my_experts(self.everyones_counts).transpose(0, 1)  # [tp, ep, experts]
            per_rank = theirs.sum(2).numpy()
            self.input_splits = mine.view(self.ep_size, -1).sum(1).numpy()
            self.output_splits, self.output_splits_tp = per_rank[self.tp_rank], per_rank.sum(1)
            self.num_global_tokens_per_local_expert = theirs.reshape(-1, self.num_local_experts)
        return tokens_per_expert

    def dispatch_postprocess(
        self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The rows that this rank's experts got, sorted by expert; counts of the experts; router weights."""
        if not self.is_alone:
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        return global_input_tokens, self.tokens_per_expert, global_probs  # the permute has sorted them

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The experts' results in the order in which the rows came."""
        return hidden_states if self.is_alone else super().combine_preprocess(hidden_states)

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of [s, b, hidden] sorted by expert, [rows, hidden], and their router weights [rows]."""
        if not self.is_even:
            return super().dispatch_preprocess(hidden_states, routing_map, probs)
        self.hidden_shape, self.probs, self.routing_map = hidden_states.shape, probs, routing_map
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        self.hidden_shape_before_permute = tokens.shape
        counts = self.preprocess(routing_map)
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", counts)
        rows, weights, self.reversed_local_input_permutation_mapping = self.kernels.permute(
            tokens, routing_map, probs, self.num_out_tokens
        )
        return rows, weights

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> torch.Tensor:
        """The reverse, with the copies of a token added up."""
        if not self.is_even:
            return super().combine_postprocess(permutated_local_input_tokens)
        tokens = self.hidden_shape_before_permute[0]
        indices = self.reversed_local_input_permutation_mapping
        return self.kernels.unpermute(permutated_local_input_tokens, indices, tokens).view(self.hidden_shape)


class MoE(MoELayer):
    """megatron's MoE layer with the dispatcher above, which gets from the router what that has computed already."""

    def __init__(self, *sizes: object, kernels: Kernels, **options: object) -> None:
        options.setdefault("pg_collection", get_default_pg_collection())
        super().__init__(*sizes, **options)
        if self.config.moe_token_dispatcher_type == "alltoall":
            self.token_dispatcher = Dispatcher(
                self.num_local_experts,
                self.local_expert_indices,
                config=self.config,
                pg_collection=options["pg_collection"],
                kernels=kernels,
            )

    def preprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows for the experts, and their router weights, from the hidden state that the router has passed on."""
        if isinstance(self.token_dispatcher, Dispatcher):
            self.token_dispatcher.known_counts = self.router.counts
        passed, self.router.hidden = self.router.hidden, None
        return super().preprocess(hidden_states if passed is None else passed, probs, routing_map)
