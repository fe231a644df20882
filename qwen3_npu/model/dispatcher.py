"""The MoE layer with our kernels where tokens are copied to their experts and added up again."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from qwen3_npu.kernels import Kernels


class Dispatcher(MoEAlltoAllTokenDispatcher):
    """megatron's all-to-all dispatcher; `permute` and `unpermute` are kernels.

    Those need the same number of experts for every token: with a capacity (tokens are dropped) megatron's own serve.
    """

    def __init__(self, *sizes: Any, kernels: Kernels, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.kernels = kernels
        self.is_even = self.config.moe_expert_capacity_factor is None

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
    """megatron's MoE layer with the dispatcher above."""

    def __init__(self, *sizes: Any, kernels: Kernels, **options: Any) -> None:
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
