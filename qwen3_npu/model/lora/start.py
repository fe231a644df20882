"""The parameters of adapters, and what they are at first."""

from __future__ import annotations

import math

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig

from qwen3_npu.args.lora import LoraArgs
from qwen3_npu.model.modules import mark


class AdapterWeight(torch.nn.Module):
    """Holds one parameter under the name `weight`; called for it, because --overlap-param-gather waits in calls."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self) -> torch.nn.Parameter:
        return self.weight


def new_weight(
    device: torch.device, rows: int, columns: int, *, dim: int | None, config: TransformerConfig
) -> AdapterWeight:
    """Zeros; `dim` is sharded over tensor parallelism, if any is."""
    weight = torch.nn.Parameter(torch.zeros(rows, columns, dtype=config.params_dtype, device=device))
    if dim is not None:
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)
    else:
        # Under sequence parallelism each rank sees a part of the tokens: megatron sums the gradient over TP.
        mark(weight, sequence_parallel=config.sequence_parallel)
    return AdapterWeight(weight)


def draw(weight: torch.Tensor, args: LoraArgs, columns: int) -> None:
    """A as peft initialises it; `columns` is the input's whole size."""
    if args.lora_init == "gaussian":
        weight.data.normal_(std=1 / args.lora_r)
    else:
        bound = math.sqrt(3) * (
            math.sqrt(2 / 6) / math.sqrt(columns)
        )  # torch's kaiming_uniform_(a=sqrt(5)), to the bit
        weight.data.uniform_(-bound, bound)
