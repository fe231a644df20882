"""Adapters of experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from qwen3_npu.args.lora import LoraArgs
from qwen3_npu.model.experts import GroupedExperts, is_like_dense
from qwen3_npu.model.lora.dora import RowLengths
from qwen3_npu.model.lora.start import draw, principal, subtracted
from qwen3_npu.model.modules import mark
from qwen3_npu.model.quantized import held, restored


class LoraExperts(GroupedExperts):
    """Stacked experts, frozen, with an adapter per expert.

    Shapes (e experts of this rank, f = ffn / expert tensor parallel size), two-dimensional like the base weights:
        weight1_lora_a [hidden, e r], memory (e, hidden, r)    weight1_lora_b [r, e 2f], memory (e, r, [gate | up])
        weight2_lora_a [e f, r], memory (e, f, r)              weight2_lora_b [e r, hidden], memory (e, r, hidden)
    With DoRA weight1_lora_magnitude_vector [e 2f] and weight2_lora_magnitude_vector [e hidden].
    """

    def __init__(self, *sizes: int, args: LoraArgs, adapted: Collection[str], **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.scale, self.dropout, self.rank = args.scale, args.lora_dropout, args.lora_r
        self.enabled, self.from_base = True, args.lora_init == "pissa"
        e, r = self.num_local_experts, args.lora_r
        sharded = self.pg_collection.expt_tp.size() > 1
        if "linear_fc1" in adapted:
            self.weight1_lora_a = self._update(self.hidden, e * r, is_sharded=False)
            self.weight1_lora_b = self._update(r, e * 2 * self.ffn, is_sharded=sharded)
            self._init_each(self.weight1_lora_a, args, self.hidden, alike=True)
        if "linear_fc2" in adapted:
            self.weight2_lora_a = self._update(e * self.ffn, r, is_sharded=sharded)
            self.weight2_lora_b = self._update(e * r, self.hidden, is_sharded=False)
            self._init_each(self.weight2_lora_a, args, self.ffn, alike=False)
        if self.from_base:
            for name in [name for name, _ in self.named_parameters() if "lora_" in name]:
                begun = torch.nn.Parameter(getattr(self, name).detach().clone())
                vars(begun).update(vars(getattr(self, name)))
                self.register_parameter(f"{name}_initial", begun)
        self.adapted = [which for which in (1, 2) if f"linear_fc{which}" in adapted]
        self.is_dora = args.use_dora
        self.row_lengths: dict[int, RowLengths] = {}
        if self.is_dora:
            self._add_magnitudes(adapted, is_sharded=sharded)

    def _add_magnitudes(self, adapted: Collection[str], *, is_sharded: bool) -> None:
        """DoRA: add the trained lengths of the rows of each expert's W + scale B A."""
        e = self.num_local_experts
        if "linear_fc1" in adapted:
            self.weight1_lora_magnitude_vector = self._update(e * 2 * self.ffn, is_sharded=is_sharded)
            self.row_lengths[1] = RowLengths(self.scale, None)
        if "linear_fc2" in adapted:
            self.weight2_lora_magnitude_vector = self._update(e * self.hidden, is_sharded=False)
            self.row_lengths[2] = RowLengths(self.scale, self.pg_collection.expt_tp)

    def lengths(self, which: int) -> torch.Tensor:
        """The lengths of rows of each expert's W + scale B A in weight1 or weight2, [experts, out (/ ETP)] float32."""
        a, b, e = getattr(self, f"weight{which}_lora_a"), getattr(self, f"weight{which}_lora_b"), self.num_local_experts
        weight = getattr(self, f"weight{which}")
        rows = restored(weight)
        if held(weight) is None:
            rows = rows.view(e, self.hidden if which == 1 else self.ffn, -1).transpose(1, 2)
        a, b = (matrix.transpose(1, 2) for matrix in (a.view(e, -1, self.rank), b.view(e, self.rank, -1)))
        return self.row_lengths[which](rows, a, b)

    def state_of(self, some: slice) -> dict[str, object]:
        """As the base's."""
        lengths = {which: whole.of_part(some) for which, whole in self.row_lengths.items()}
        return super().state_of(some) | {"row_lengths": lengths}

    def products(self, tokens_per_expert: torch.Tensor, rows: int) -> Callable:
        """As the base's; with DoRA the result also has the expert of each row."""
        product = super().products(tokens_per_expert, rows)
        if not self.is_dora:
            return product
        counts = tokens_per_expert.to(self.weight1.device)
        numbers = torch.arange(len(counts), device=counts.device)
        # With the number of rows given, the host does not wait for their sum. A 910B's cores do not search int64.
        return _Products(product, numbers.repeat_interleave(counts, output_size=rows))

    def _update(self, *shape: int, is_sharded: bool) -> torch.nn.Parameter:
        kind, device = self.config.params_dtype, self.weight1.device
        weight = torch.nn.Parameter(torch.zeros(shape, dtype=kind, device=device))
        mark(weight, allreduce=is_like_dense(self.config))
        if is_sharded or self.pg_collection.expt_tp.size() == 1:
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)
        else:
            # It is replicated over the experts' tensor parallel group, and each rank sees a part of the product.
            mark(weight, sequence_parallel=True)
        return weight

    def _init_each(self, weight: torch.nn.Parameter, args: LoraArgs, rows: int, *, alike: bool) -> None:
        """Initialize by the size of one expert's input; `alike`: equal on every rank that shares the experts."""
        name = tensor_parallel.random.get_expert_parallel_rng_tracker_name()
        with tensor_parallel.get_cuda_rng_tracker().fork(name):
            draw(weight, args, rows if alike else rows * self.pg_collection.expt_tp.size())
        if alike:
            torch.distributed.broadcast(
                weight.data,
                torch.distributed.get_global_rank(self.pg_collection.expt_tp, 0),
                group=self.pg_collection.expt_tp,
            )

    @torch.no_grad()
    def begin(self) -> None:
        """Initialize new adapters from the base's weights, once they are loaded."""
        for which in self.row_lengths if self.is_dora else ():
            getattr(self, f"weight{which}_lora_magnitude_vector").copy_(self.lengths(which).flatten())

    @torch.no_grad()
    def residual(self, which: int, weight: torch.Tensor, *, is_new: bool) -> torch.Tensor:
        """PiSSA: the residual of complete weights (expert, in, out). New A and B are set to the subtracted part."""
        e, group, r = self.num_local_experts, self.pg_collection.expt_tp, self.rank
        turned, own = weight.to(self.weight1.device).transpose(1, 2), f"weight{which}_lora_"
        if is_new:
            a, b = principal(turned, r, self.scale, group=group, dim=which - 1)
            for end in ("", "_initial"):
                getattr(self, f"{own}a{end}").view(e, -1, r).copy_(a.transpose(1, 2))
                getattr(self, f"{own}b{end}").view(e, r, -1).copy_(b.transpose(1, 2))
        a = getattr(self, f"{own}a_initial").view(e, -1, r).transpose(1, 2)
        b = getattr(self, f"{own}b_initial").view(e, r, -1).transpose(1, 2)
        return subtracted(turned, a, b, self.scale).transpose(1, 2)

    def multiply(self, which: int, x: torch.Tensor, product: Callable) -> torch.Tensor:
        """The base product plus the adapter's."""
        out = super().multiply(which, x, product)
        a = getattr(self, f"weight{which}_lora_a", None)
        if a is None or not self.enabled:
            return out
        b, e = getattr(self, f"weight{which}_lora_b"), self.num_local_experts
        if self.training and self.dropout:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                x = torch.nn.functional.dropout(x, self.dropout)
        narrow = product(x, a.view(e, -1, self.rank)) * self.scale
        out = out + product(narrow, b.view(e, self.rank, -1))
        if isinstance(product, _Products):
            # As in a linear, but each row has the factors of its own expert.
            magnitudes = getattr(self, f"weight{which}_lora_magnitude_vector").view(e, -1)
            factors = (magnitudes / self.lengths(which)).to(out.dtype)
            out = out * factors.index_select(0, product.expert_of_row)
        return out


@dataclasses.dataclass(frozen=True)
class _Products:
    """Rows times their experts' matrices, and the expert of each row."""

    product: Callable
    expert_of_row: torch.Tensor

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self.product(x, weight)
