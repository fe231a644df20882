"""LoRA (arXiv:2106.09685): low-rank adapters beside frozen weights, W x + (alpha / r) B A x; rsLoRA: alpha / sqrt(r).

Names and shapes are MindSpeed-LLM's, so checkpoints are exchanged:

    linear_qkv, linear_fc1    base_layer.weight, lora_A.default.weight [r, in], lora_B.default.weight [out/tp, r]
    linear_proj, linear_fc2   base_layer.weight, lora_A.default.weight [r, in/tp], lora_B.default.weight [out, r]
    output_layer, word_embeddings    base_layer.weight, lora_A.default.weight, lora_B.default.weight
    experts                   weight1_lora_a/_lora_b, weight2_lora_a/_lora_b, one adapter per expert

One A serves q, k and v, and one serves gate and up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from qwen3_npu.args.lora import LoraArgs
from qwen3_npu.kernels import reference
from qwen3_npu.model.experts import GroupedExperts, is_like_dense
from qwen3_npu.model.modules import Embedding, mark, weight_gradient
from qwen3_npu.model.quantized import held, restored


class _Weight(torch.nn.Module):
    """Holds one parameter under the name `weight`; called for it, because --overlap-param-gather waits in calls."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self) -> torch.nn.Parameter:
        return self.weight


def _new_weight(
    device: torch.device, rows: int, columns: int, *, dim: int | None, config: TransformerConfig
) -> _Weight:
    """Zeros; `dim` is sharded over tensor parallelism, if any is."""
    weight = torch.nn.Parameter(torch.zeros(rows, columns, dtype=config.params_dtype, device=device))
    if dim is not None:
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)
    else:
        # Under sequence parallelism each rank sees a part of the tokens: megatron sums the gradient over TP.
        mark(weight, sequence_parallel=config.sequence_parallel)
    return _Weight(weight)


def _draw(weight: torch.Tensor, args: LoraArgs, columns: int) -> None:
    """A as peft initialises it; `columns` is the input's whole size."""
    if args.lora_init == "gaussian":
        weight.data.normal_(std=1 / args.lora_r)
    else:
        bound = math.sqrt(3) * (
            math.sqrt(2 / 6) / math.sqrt(columns)
        )  # torch's kaiming_uniform_(a=sqrt(5)), to the bit
        weight.data.uniform_(-bound, bound)


class _Adapted(torch.autograd.Function):
    """x W^T + scale x A^T B^T (+ residual), W frozen: three products forward, five backward, and nothing else.

    The narrow product is kept with its factor, which the gradient of B needs and addmm applies.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        residual: torch.Tensor | None,
        linear: LoraLinear,
    ) -> torch.Tensor:
        rows, weight = x.flatten(0, -2), linear.base_layer.weight
        base = restored(weight)
        narrow = torch.addmm(a[:, 0], rows, a.t(), beta=0, alpha=linear.scale)
        out = rows @ base.t() if residual is None else torch.addmm(residual.flatten(0, -2), rows, base.t())
        out.addmm_(narrow, b.t())
        ctx.save_for_backward(rows, narrow)
        ctx.weights, ctx.linear, ctx.shape = (weight, a, b), linear, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        rows, narrow = ctx.saved_tensors
        base, a, b = ctx.weights
        add = ctx.linear.add_weight_gradient
        d_out, dx = grad.flatten(0, -2), None
        d_narrow = torch.addmm(b[0], d_out, b, beta=0, alpha=ctx.linear.scale)
        if ctx.needs_input_grad[0]:
            dx = (d_out @ restored(base)).addmm_(d_narrow, a).view(ctx.shape)
        da, db = (weight_gradient(*pair, add) for pair in ((a, rows, d_narrow), (b, narrow, d_out)))
        d_residual = grad if ctx.needs_input_grad[3] else None
        return dx, da, db, d_residual, None


class LoraLinear(MegatronModule):
    """A frozen column- or row-parallel linear with its adapter.

    The last matrix multiplication adds the adapter to the output (addmm). The factor alpha / r is applied to the narrow
    product A x: no tensor of the output's size is made beside the output itself.
    """

    def __init__(
        self, *sizes: int, linear: Callable, args: LoraArgs, add_weight_gradient: Callable, **options: object
    ) -> None:
        """Args: linear: the base layer's class; `sizes` and `options` are its own arguments."""
        super().__init__(config=options["config"])
        self.add_weight_gradient = add_weight_gradient
        self.base_layer = base = linear(*sizes, **options)
        self.by_output = isinstance(base, ColumnParallelLinear)
        self.scale, self.dropout = args.scale, args.lora_dropout
        self.enabled = True  # off: the base layer alone, which is the reference of preference training
        self.group = base.tp_group
        self.sequence_parallel = base.config.sequence_parallel
        self.disable_grad_reduce = False
        kind = held(base.weight)
        out_features, in_features = base.weight.shape if kind is None else kind.shape
        first = self._weight(args.lora_r, in_features, not self.by_output, 1)
        second = self._weight(out_features, args.lora_r, self.by_output, 0)
        self.lora_A = torch.nn.ModuleDict({"default": first})
        self.lora_B = torch.nn.ModuleDict({"default": second})
        if self.by_output:
            _draw(first.weight, args, in_features)  # replicated: drawn outside the tracker, alike on every rank
        else:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                _draw(first.weight, args, in_features * self.group.size())

    def _weight(self, rows: int, columns: int, is_sharded: bool, dim: int) -> _Weight:
        device = self.base_layer.weight.device
        return _new_weight(device, rows, columns, dim=dim if is_sharded else None, config=self.config)

    @property
    def is_one_function(self) -> bool:
        """Whether adapter and base are computed as one: nothing is exchanged between the products, nothing dropped."""
        drops = self.training and self.dropout > 0.0
        return self.enabled and not drops and self.group.size() == 1 and self.base_layer.bias is None

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the base layer: [s, b, in] -> [s, b, out], and the bias that is still to be added, if it has one.

        Args:
            residual: [s, b, out], added to the output; only with `is_one_function`.
        """
        if self.is_one_function:
            return _Adapted.apply(x, self.lora_A["default"](), self.lora_B["default"](), residual, self), None
        out, bias = self.base_layer(x)
        if not self.enabled:
            return out, bias
        narrow = torch.nn.functional.linear(self._dropped(x), self.lora_A["default"]()) * self.scale
        if self.by_output:
            narrow = (
                gather_from_sequence_parallel_region(narrow, group=self.group)
                if self.sequence_parallel
                else narrow
                if self.disable_grad_reduce
                else copy_to_tensor_model_parallel_region(narrow, group=self.group)
            )
        else:
            narrow = (
                reduce_scatter_to_sequence_parallel_region(narrow, group=self.group)
                if self.sequence_parallel
                else reduce_from_tensor_model_parallel_region(narrow, group=self.group)
            )
        weight = self.lora_B["default"]()
        return torch.addmm(out.flatten(0, 1), narrow.flatten(0, 1), weight.t()).view_as(out), bias

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.dropout == 0.0:
            return x
        if self.by_output and not self.sequence_parallel:
            return torch.nn.functional.dropout(x, self.dropout)  # x is the same on every TP rank, so is the mask
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return torch.nn.functional.dropout(x, self.dropout)


class LoraOutput(LoraLinear):
    """The output layer with its adapter, called as GPTModel calls it.

    Attributes:
        sequence_parallel, disable_grad_reduce: as megatron's linear has them; the chunked loss sets them.
    """

    def __init__(self, base: ColumnParallelLinear, args: LoraArgs) -> None:
        # The chunked loss computes this with views of the weights, which know no `main_grad`.
        add = reference.add_weight_gradient
        super().__init__(linear=lambda **_: base, args=args, add_weight_gradient=add, config=base.config)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, weight: None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, hidden] -> logits [s, b, vocabulary / TP]."""
        for name in ("sequence_parallel", "disable_grad_reduce"):
            setattr(self.base_layer, name, getattr(self, name))
        return super().forward(x)


class LoraEmbedding(torch.nn.Module):
    """The frozen embedding E with its adapter: E[t] + scale B A[:, t]. A [r, vocabulary / TP], B [hidden, r].

    A is 0 at first and B is drawn, as peft does for embeddings.
    """

    def __init__(self, base: Embedding, args: LoraArgs, config: TransformerConfig) -> None:
        super().__init__()
        self.base_layer, self.scale, self.enabled = base, args.scale, True
        rows, hidden = base.weight.shape
        self.lora_A = torch.nn.ModuleDict(
            {"default": _new_weight(base.weight.device, args.lora_r, rows, dim=1, config=config)}
        )
        b = _new_weight(base.weight.device, hidden, args.lora_r, dim=None, config=config)
        self.lora_B = torch.nn.ModuleDict({"default": b})
        b.weight.data.normal_()  # outside the tracker: alike on every rank

    @property
    def weight(self) -> torch.nn.Parameter:
        """The base's; GPTModel asks for it."""
        return self.base_layer.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """As the base layer."""
        out = self.base_layer(tokens)
        if not self.enabled:
            return out
        narrow = self.base_layer.rows(tokens, self.lora_A["default"]().t()) * self.scale
        return out + torch.nn.functional.linear(narrow, self.lora_B["default"]())


class LoraExperts(GroupedExperts):
    """Stacked experts, frozen, with an adapter per expert.

    Shapes (e experts of this rank, f = ffn / expert tensor parallel size), two-dimensional like the base weights:
        weight1_lora_a [hidden, e r], memory (e, hidden, r)    weight1_lora_b [r, e 2f], memory (e, r, [gate | up])
        weight2_lora_a [e f, r], memory (e, f, r)              weight2_lora_b [e r, hidden], memory (e, r, hidden)
    """

    def __init__(self, *sizes: Any, args: LoraArgs, adapted: Collection[str], **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.scale, self.dropout, self.rank = args.scale, args.lora_dropout, args.lora_r
        self.enabled = True
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

    def _update(self, rows: int, columns: int, *, is_sharded: bool) -> torch.nn.Parameter:
        kind, device = self.config.params_dtype, self.weight1.device
        weight = torch.nn.Parameter(torch.zeros(rows, columns, dtype=kind, device=device))
        mark(weight, allreduce=is_like_dense(self.config))
        if is_sharded or self.pg_collection.expt_tp.size() == 1:
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)
        else:
            # Replicated over the experts' tensor parallel group, each rank of which sees a part of the product.
            mark(weight, sequence_parallel=True)
        return weight

    def _init_each(self, weight: torch.nn.Parameter, args: LoraArgs, rows: int, *, alike: bool) -> None:
        """By the size of one expert's input; `alike`: the same on every rank that shares the experts."""
        name = tensor_parallel.random.get_expert_parallel_rng_tracker_name()
        with tensor_parallel.get_cuda_rng_tracker().fork(name):
            _draw(weight, args, rows if alike else rows * self.pg_collection.expt_tp.size())
        if alike:
            torch.distributed.broadcast(
                weight.data,
                torch.distributed.get_global_rank(self.pg_collection.expt_tp, 0),
                group=self.pg_collection.expt_tp,
            )

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
        return out + product(narrow, b.view(e, self.rank, -1))


ADAPTERS = (LoraLinear, LoraEmbedding, LoraExperts)
