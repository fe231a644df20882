"""Adapters of linears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule

from qwen3_npu.args.lora import LoraArgs
from qwen3_npu.kernels import reference
from qwen3_npu.model.lora.dora import RowLengths
from qwen3_npu.model.lora.start import AdapterWeight, draw, new_weight, principal, subtracted
from qwen3_npu.model.modules import weight_gradient
from qwen3_npu.model.quantized import restored, restored_shape


class _Adapted(torch.autograd.Function):
    """x W^T + scale x A^T B^T (+ residual), W frozen: three products forward, five backward, no other operations.

    The narrow product is kept with the factor that addmm applies, since the gradient of B needs it.
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
        self.scale, self.dropout, self.rank = args.scale, args.lora_dropout, args.lora_r
        self.from_base = args.lora_init == "pissa"
        self.enabled = True  # False: only the base layer is computed, as the reference model of preference training
        self.group = base.tp_group
        self.sequence_parallel = base.config.sequence_parallel
        self.disable_grad_reduce = False
        out_features, in_features = restored_shape(base.weight)
        first = self._weight(args.lora_r, in_features, not self.by_output, 1)
        second = self._weight(out_features, args.lora_r, self.by_output, 0)
        self.lora_A = torch.nn.ModuleDict({"default": first})
        self.lora_B = torch.nn.ModuleDict({"default": second})
        if self.from_base:
            self.lora_A["initial"] = self._weight(args.lora_r, in_features, not self.by_output, 1)
            self.lora_B["initial"] = self._weight(out_features, args.lora_r, self.by_output, 0)
        self.is_dora = args.use_dora
        if self.is_dora:
            self._add_magnitudes(out_features)
        if self.by_output:
            draw(first.weight, args, in_features)  # replicated: drawn outside the tracker, alike on every rank
        else:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                draw(first.weight, args, in_features * self.group.size())

    def _add_magnitudes(self, rows: int) -> None:
        """DoRA: add the trained length of each row of W + scale B A."""
        device, dim = self.base_layer.weight.device, 0 if self.by_output else None
        vector = new_weight(device, rows, dim=dim, config=self.config)
        self.lora_magnitude_vector = torch.nn.ModuleDict({"default": vector})
        self.row_lengths = RowLengths(self.scale, None if self.by_output else self.group)

    def lengths(self) -> torch.Tensor:
        """The lengths of the rows of W + scale B A, [out (/ TP)] float32."""
        return self.row_lengths(restored(self.base_layer.weight), self.lora_A["default"](), self.lora_B["default"]())

    @torch.no_grad()
    def begin(self) -> None:
        """Initialize a new adapter from the base's weights, once they are loaded."""
        if self.is_dora:
            self.lora_magnitude_vector["default"]().copy_(self.lengths())

    @torch.no_grad()
    def residual(self, weight: torch.Tensor, *, is_new: bool) -> torch.Tensor:
        """PiSSA: the residual of the complete weight [out, in]. New A and B are set to the part that is subtracted."""
        weight = weight.to(self.base_layer.weight.device)
        if is_new:
            dim = 0 if self.by_output else 1
            a, b = principal(weight, self.rank, self.scale, group=self.group, dim=dim)
            for name in ("default", "initial"):
                self.lora_A[name]().copy_(a)
                self.lora_B[name]().copy_(b)
        return subtracted(weight, self.lora_A["initial"](), self.lora_B["initial"](), self.scale)

    def _weight(self, rows: int, columns: int, is_sharded: bool, dim: int) -> AdapterWeight:
        device = self.base_layer.weight.device
        return new_weight(device, rows, columns, dim=dim if is_sharded else None, config=self.config)

    @property
    def is_one_function(self) -> bool:
        """Whether one function computes adapter and base: no communication between the products, and no dropout."""
        drops = self.training and self.dropout > 0.0
        alone = self.group.size() == 1 and self.base_layer.bias is None and not self.is_dora
        return self.enabled and not drops and alone

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the base layer: [s, b, in] -> [s, b, out], and the bias that the caller must add, if it has one.

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
        out = torch.addmm(out.flatten(0, 1), narrow.flatten(0, 1), weight.t()).view_as(out)
        if self.is_dora:
            # Gradients go through the magnitude and the direction, not through its length, as in the paper (4.3).
            out = out * (self.lora_magnitude_vector["default"]() / self.lengths()).to(out.dtype)
        return out, bias

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.dropout == 0.0:
            return x
        if self.by_output and not self.sequence_parallel:
            return torch.nn.functional.dropout(x, self.dropout)  # x and the mask are the same on every TP rank
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return torch.nn.functional.dropout(x, self.dropout)


class LoraOutput(LoraLinear):
    """The output layer with its adapter, called as GPTModel calls it.

    Attributes:
        sequence_parallel, disable_grad_reduce: as megatron's linear has them; the chunked loss sets them.
    """

    def __init__(self, base: ColumnParallelLinear, args: LoraArgs) -> None:
        # The chunked loss computes this with views of the weights, which have no `main_grad`.
        add = reference.add_weight_gradient
        super().__init__(linear=lambda **_: base, args=args, add_weight_gradient=add, config=base.config)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, weight: None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, hidden] -> logits [s, b, vocabulary / TP]."""
        for name in ("sequence_parallel", "disable_grad_reduce"):
            setattr(self.base_layer, name, getattr(self, name))
        return super().forward(x)
