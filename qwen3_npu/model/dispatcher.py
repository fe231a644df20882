"""The MoE layer with our kernels for copying tokens to their experts and summing the results."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection, maybe_move_tensor_to_cpu
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from qwen3_npu.distributed.layout import exchange_pieces
from qwen3_npu.kernels import Kernels
from qwen3_npu.model.expert_parallel.exchange import (
    Exchange,
    ExchangePiece,
    combined,
    dispatched,
    expert_parts,
    pieces_of,
    widened,
    with_weights,
)
from qwen3_npu.model.router import first_tokens


class Dispatcher(MoEAlltoAllTokenDispatcher):
    """megatron's all-to-all dispatcher; `permute` and `unpermute` are kernels, and the host waits once at most.

    Both kernels need the same number of experts for every token; with a capacity (dropped tokens) megatron's own are
    used. The counts of the experts stay on the device, where the grouped products read them. The host needs only the
    numbers of rows to send and receive: none if this rank has all experts, else one copy during the permute.
    """

    def __init__(self, *sizes: object, kernels: Kernels, hides_exchange: bool, **options: object) -> None:
        """Args: hides_exchange: behind products."""
        super().__init__(*sizes, **options)
        self.kernels = kernels
        self.known_counts: torch.Tensor | None = None
        self.order: torch.Tensor | None = None
        self.is_even = self.config.moe_expert_capacity_factor is None
        self.is_alone = self.is_even and self.ep_size * self.tp_size == 1
        self.pieces = exchange_pieces(self.num_local_experts) if hides_exchange and self.ep_size > 1 else 1

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
        first = self.local_expert_indices[0]
        return everyone[..., first : first + self.num_local_experts].sum((0, 1))

    def sizes(self) -> list[ExchangePiece]:
        """Numbers of exchanged rows. The host waits for them here."""
        self.d2h_event.synchronize()
        rank, first = (self.ep_group.rank(), self.tp_rank), self.local_expert_indices[0]
        return pieces_of(self.everyones_counts.numpy(), rank, slice(first, first + self.num_local_experts), self.pieces)

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of [s, b, hidden] sorted by expert, [rows, hidden], and their router weights [rows].

        Rows for other ranks are sorted by piece first and contain their router weights.
        """
        if self.drop_and_pad:
            return self._padded(hidden_states, routing_map, probs)
        if not self.is_even:
            return super().dispatch_preprocess(hidden_states, routing_map, probs)
        self.hidden_shape, tokens = hidden_states.shape, hidden_states.view(-1, hidden_states.shape[-1])
        self.summed = probs.dtype
        self.tokens_per_expert = self.preprocess(routing_map)
        if not self.is_alone:
            tokens = widened(tokens)
        if self.pieces > 1:
            routing_map, probs = (self._by_piece(x) for x in (routing_map, probs))
        rows, weights, self.reversed_local_input_permutation_mapping = self.kernels.permute(
            tokens, routing_map, probs, self.num_out_tokens
        )
        return rows if self.is_alone else with_weights(rows, weights, hidden_states.shape[-1]), weights

    def _padded(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As megatron's, where each expert has `capacity` tokens. megatron sorts int8, which an NPU's cores do not."""
        self.hidden_shape, self.routing_map, self.probs = hidden_states.shape, routing_map, probs
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        self.hidden_shape_before_permute = tokens.shape
        self.tokens_per_expert = self.preprocess(routing_map)
        order = first_tokens(routing_map, self.capacity)
        firsts = torch.arange(self.num_experts, device=order.device).unsqueeze(1) * len(tokens)
        self.reversed_local_input_permutation_mapping = order.flatten()
        weights = probs.T.reshape(-1).index_select(0, (firsts + order).flatten())
        return tokens.index_select(0, order.flatten()), weights

    def _by_piece(self, x: torch.Tensor) -> torch.Tensor:
        """[t, experts of all ranks], sorted by the order in which pieces are sent."""
        if self.num_local_experts % self.pieces == 0:
            return x.view(len(x), self.ep_size, self.pieces, -1).transpose(1, 2).flatten(1)
        if self.order is None:
            numbers = torch.arange(self.num_experts, device=x.device).view(self.ep_size, -1)
            parts = expert_parts(self.num_local_experts, self.pieces)
            self.order = torch.cat([numbers[:, part].flatten() for part in parts])
        return x.index_select(1, self.order)

    def through(
        self, experts: torch.nn.Module, rows: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The experts' results for the rows of `dispatch_preprocess`, in the same order; and their bias."""
        counts = self.tokens_per_expert
        if self.is_alone:
            return experts(rows, counts, weights)
        exchange = Exchange(
            self.sizes(),
            counts,
            width=self.hidden_shape[-1],
            dtype=weights.dtype,
            summed=self.summed,
            group=self.ep_group,
            tensor_group=self.tp_group,
        )
        order = self.hidden_shape, self.reversed_local_input_permutation_mapping
        if self.pieces > 1:
            back, bias = experts(rows, exchange, None)
        else:
            tokens, probs = dispatched(rows, exchange)
            out, bias = experts(tokens, counts, probs)
            back = combined(out, exchange)
        # Another micro-batch may have been here meanwhile (--moe-fb-overlap).
        self.hidden_shape, self.reversed_local_input_permutation_mapping = order
        return back, bias

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> torch.Tensor:
        """The reverse of `dispatch_preprocess`: the copies of a token are summed."""
        if not self.is_even:
            return super().combine_postprocess(permutated_local_input_tokens)
        tokens = self.hidden_shape.numel() // self.hidden_shape[-1]
        indices = self.reversed_local_input_permutation_mapping
        return self.kernels.unpermute(permutated_local_input_tokens, indices, tokens).view(self.hidden_shape)


class MoE(MoELayer):
    """megatron's MoE layer with the dispatcher above, which reuses counts that the router has computed."""

    def __init__(self, *sizes: object, kernels: Kernels, hides_exchange: bool = False, **options: object) -> None:
        options.setdefault("pg_collection", get_default_pg_collection())
        super().__init__(*sizes, **options)
        if self.config.moe_token_dispatcher_type == "alltoall":
            self.token_dispatcher = Dispatcher(
                self.num_local_experts,
                self.local_expert_indices,
                config=self.config,
                pg_collection=options["pg_collection"],
                kernels=kernels,
                hides_exchange=hides_exchange,
            )
        self.is_ours = getattr(self.token_dispatcher, "is_even", False)

    def preprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows for the experts and their router weights, from the hidden state that the router returned."""
        if isinstance(self.token_dispatcher, Dispatcher):
            self.token_dispatcher.known_counts = self.router.counts
        passed, self.router.hidden = self.router.hidden, None
        return super().preprocess(hidden_states if passed is None else passed, probs, routing_map)

    def dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A step of megatron's; both exchanges happen in `routed_experts_compute` here."""
        return (hidden_states, probs) if self.is_ours else super().dispatch(hidden_states, probs)

    def routed_experts_compute(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The experts' results for rows of this rank, wherever the experts are."""
        if not self.is_ours:
            return super().routed_experts_compute(hidden_states, probs)
        return self.token_dispatcher.through(self.experts, hidden_states, probs)

    def combine(self, output: torch.Tensor) -> torch.Tensor:
        """A step of megatron's, see `dispatch`."""
        return output if self.is_ours else super().combine(output)
