"""A model for inference: linears that only multiply, layers without the parts that only training needs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_block import TransformerBlock

from qwen3_npu.kernels import Kernels
from qwen3_npu.model.modules import NoopLayer
from qwen3_npu.model.sequence import TokenSequence


class FrozenLinear(torch.nn.Module):
    """A column- or row-parallel linear as one matrix multiplication, and its bias.

    The weight is in the kernel's own layout.
    Column-parallel output stays sharded; row-parallel output is summed over the tensor-parallel group.
    """

    def __init__(self, linear: torch.nn.Module, weight: torch.Tensor, kernels: Kernels, rows: int) -> None:
        """Args: rows: usual number of rows of a multiplication."""
        super().__init__()
        self.multiply = kernels.prepared_linear(weight.detach(), rows)
        summed = isinstance(linear, RowParallelLinear) and linear.tp_group.size() > 1
        self.group = linear.tp_group if summed else None
        # The bias is added once, after the sum, because every rank has all of a row-parallel bias.
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        out = self.multiply(x)
        if self.group is not None:
            dist.all_reduce(out, group=self.group)
        return (out if self.bias is None else out + self.bias), None


def freeze_linears(model: torch.nn.Module, kernels: Kernels, rows: int) -> None:
    """Replace every linear that has its own weight and free that weight; one at a time, so memory hardly grows."""
    linears = (ColumnParallelLinear, RowParallelLinear)
    # The list has names, because a list of linears would keep their weights in memory.
    places = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, linears) and child.weight is not None
    ]
    for module, name in places:
        setattr(module, name, FrozenLinear(linear := getattr(module, name), linear.weight, kernels, rows))
        del linear


def run_layers(block: TransformerBlock, hidden: torch.Tensor, sequence: TokenSequence) -> torch.Tensor:
    """The layers and the final norm, [s, b, hidden].

    The result is that of megatron's TransformerLayer without dropout, whose overhead takes longer than a layer of one
    token.
    """
    for layer in block.layers:
        if isinstance(layer, NoopLayer):
            continue
        hidden = layer.computed(hidden, sequence)
    return hidden if block.final_layernorm is None else block.final_layernorm(hidden)
