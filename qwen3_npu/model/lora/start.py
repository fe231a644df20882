"""The parameters of adapters, and their initial values."""

from __future__ import annotations

import math

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig

from qwen3_npu.args.lora import LoraArgs
from qwen3_npu.model.modules import mark


class AdapterWeight(torch.nn.Module):
    """Holds one parameter under the name `weight`. A call returns it, because --overlap-param-gather waits in calls."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self) -> torch.nn.Parameter:
        return self.weight


def new_weight(device: torch.device, *shape: int, dim: int | None, config: TransformerConfig) -> AdapterWeight:
    """A parameter of zeros; `dim` is sharded over tensor parallelism, None if no dimension is."""
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=config.params_dtype, device=device))
    if dim is not None:
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)
    else:
        # Under sequence parallelism each rank sees a part of the tokens: megatron sums the gradient over TP.
        mark(weight, sequence_parallel=config.sequence_parallel)
    return AdapterWeight(weight)


def draw(weight: torch.Tensor, args: LoraArgs, columns: int) -> None:
    """A as peft initialises it; `columns` is the input's whole size."""
    if args.lora_init == "pissa":
        return  # `principal` sets it
    if args.lora_init == "gaussian":
        weight.data.normal_(std=1 / args.lora_r)
    else:
        bound = math.sqrt(3) * (
            math.sqrt(2 / 6) / math.sqrt(columns)
        )  # torch's kaiming_uniform_(a=sqrt(5)), to the bit
        weight.data.uniform_(-bound, bound)


def principal(
    weight: torch.Tensor, r: int, scale: float, *, group: torch.distributed.ProcessGroup, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """PiSSA (arXiv:2404.02948): A and B of this rank's part of W, the best approximation of W / scale of rank r.

    A and B each take the square root of the singular values.

    Args:
        weight: [.., out, in], sharded over `group` along -2 (`dim` 0) or -1 (`dim` 1).

    Returns:
        A [.., r, in]; B [.., out, r]. The one on the sharded side is this rank's part.
    """
    axis, dtype = dim - 2, weight.dtype
    weight = weight.contiguous()  # as NCCL and HCCL want what they send, and where it goes
    parts = [torch.empty_like(weight) for _ in range(group.size())]
    torch.distributed.all_gather(parts, weight, group=group)
    u, values, v = torch.linalg.svd(torch.cat(parts, axis).float(), full_matrices=False)
    roots = (values[..., :r] / scale).sqrt()
    a, b = (roots.unsqueeze(-1) * v[..., :r, :]).to(dtype), (u[..., :r] * roots.unsqueeze(-2)).to(dtype)
    a, b = a.contiguous(), b.contiguous()  # as NCCL and HCCL want them
    for matrix in (a, b):  # the same on every rank, to the bit
        torch.distributed.broadcast(matrix, torch.distributed.get_global_rank(group, 0), group=group)
    size, start = weight.shape[axis], weight.shape[axis] * group.rank()
    b = b.narrow(-2, start, size) if dim == 0 else b
    a = a.narrow(-1, start, size) if dim == 1 else a
    return a, b


def subtracted(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """W - scale B A, computed in float32."""
    return (weight.float() - scale * (b.float() @ a.float())).to(weight.dtype)
