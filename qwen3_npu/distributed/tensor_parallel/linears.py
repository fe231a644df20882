"""megatron's tensor-parallel linears, with products that hide their communication."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from qwen3_npu.distributed.tensor_parallel.products import (
    Link,
    Overlap,
    gathered_product,
    scattered_product,
    summed_product,
)


class OverlappedColumn(ColumnParallelLinear):
    """megatron's column-parallel linear with sequence parallelism. (Without it, megatron hides the sum of gradients.)

    Attributes:
        link: shared with the row-parallel linear that comes next, see `linked`.
    """

    def __init__(self, *sizes: object, overlap: Overlap, **options: object) -> None:
        super().__init__(*sizes, **options)
        self.overlap, self.link = overlap, Link()

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: object, **options: Any) -> torch.Tensor:
        if not options["sequence_parallel"]:
            return super()._forward_impl(input, weight, *args, **options)
        out = gathered_product(input, weight, self.overlap, self.tp_group, link=self.link)
        return out if options["bias"] is None else out + options["bias"]


class OverlappedRow(RowParallelLinear):
    """megatron's row-parallel linear, with or without sequence parallelism."""

    def __init__(self, *sizes: object, overlap: Overlap, **options: object) -> None:
        super().__init__(*sizes, **options)
        self.overlap, self.link = overlap, Link()

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, in / TP] -> [s, b, out] ([s / TP, b, out] under sequence parallelism), and a bias to add later."""
        if self.sequence_parallel:
            out = scattered_product(input_, self.weight, self.overlap, self.tp_group, link=self.link)
        else:
            out = summed_product(input_, self.weight, self.overlap, self.tp_group)
        if self.skip_bias_add:
            return out, self.bias
        return (out if self.bias is None else out + self.bias), None


OVERLAPPED = {ColumnParallelLinear: OverlappedColumn, RowParallelLinear: OverlappedRow}


def link_linears(model: torch.nn.Module) -> None:
    """Connect the two linears of each attention and MLP, and say where the device's fused operations will not serve."""
    for module in model.modules():
        if isinstance(module, OverlappedColumn | OverlappedRow):
            for weight in (module.weight.t(), module.weight):  # forward, backward
                module.overlap.fused_for(weight, weight, module.tp_group)
        for first, second in (("linear_qkv", "linear_proj"), ("linear_fc1", "linear_fc2")):
            column, row = (_base(getattr(module, name, None)) for name in (first, second))
            if isinstance(column, OverlappedColumn) and isinstance(row, OverlappedRow):
                row.link = column.link


def _base(linear: object) -> object:
    """The base layer of an adapter, or the linear itself."""
    return getattr(linear, "base_layer", linear)
