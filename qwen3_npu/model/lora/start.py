"""The parameters of adapters, and their initial values."""

from __future__ import annotations

import math

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig

from qwen3_npu.args.lora import LoraArgs
from qwen3_npu.model.modules import mark

_ROWS = 1 << 13  # rows of a weight that exist in float64 at the same time


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

    A and B each take the square root of the singular values. They do not depend on how W is sharded: float32 would
    round otherwise where a rank's rows have another order (gate and up), which flips codes of a residual in 4 bits.

    Args:
        weight: [.., out, in], sharded over `group` along -2 (`dim` 0) or -1 (`dim` 1).

    Returns:
        A [.., r, in]; B [.., out, r]. The one on the sharded side is this rank's part.
    """
    axis, dtype, device = dim - 2, weight.dtype, weight.device
    weight = weight.contiguous()  # as NCCL and HCCL want what they send, and where it goes
    parts = [torch.empty_like(weight) for _ in range(group.size())]
    torch.distributed.all_gather(parts, weight, group=group)
    whole = torch.cat(parts, axis).to(_exact(device))
    found = [_largest(matrix, r) for matrix in whole.flatten(0, -3)] if whole.dim() > 2 else [_largest(whole, r)]
    roots = [(values / scale).sqrt() for _, values, _ in found]
    a = torch.stack([root.unsqueeze(-1) * v for root, (_, _, v) in zip(roots, found, strict=True)])
    b = torch.stack([u * root for root, (u, _, _) in zip(roots, found, strict=True)])
    a, b = (each.view(*weight.shape[:-2], *each.shape[-2:]).to(device, dtype) for each in (a, b))
    a, b = a.contiguous(), b.contiguous()  # as NCCL and HCCL want them
    for matrix in (a, b):  # the same on every rank, to the bit
        torch.distributed.broadcast(matrix, torch.distributed.get_global_rank(group, 0), group=group)
    size, start = weight.shape[axis], weight.shape[axis] * group.rank()
    b = b.narrow(-2, start, size) if dim == 0 else b
    a = a.narrow(-1, start, size) if dim == 1 else a
    return a, b


def subtracted(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """W - scale B A, computed in float64: it is rounded once, alike in every layout."""
    where, left = _exact(weight.device), torch.empty_like(weight)
    matrices = (each.reshape(-1, *each.shape[-2:]) for each in (left, weight, a, b))
    for rest, matrix, first, second in zip(*matrices, strict=True):
        first = first.to(where).double()
        for start in range(0, len(matrix), _ROWS):
            rows = slice(start, start + _ROWS)
            rest[rows] = matrix[rows].to(where).double() - scale * (second[rows].to(where).double() @ first)
    return left


def _exact(device: torch.device) -> torch.device:
    """Where float64 is computed: an NPU's cores have none."""
    return device if device.type == "cuda" else torch.device("cpu")


def _largest(matrix: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The r largest singular values of a matrix [out, in] and their vectors, float64: [out, r], [r], [r, in].

    They come from the eigenvectors of the products of the shorter side's vectors: less work than the decomposition of
    the whole, and float64 has digits enough for the squares. Vectors have a sign that no order of rows changes.
    """
    is_tall = matrix.shape[0] >= matrix.shape[1]
    parts = (matrix if is_tall else matrix.t()).split(_ROWS)
    squares, vectors = torch.linalg.eigh(sum(part.double().t() @ part.double() for part in parts))
    values, short = squares[-r:].flip(0).clamp(min=0).sqrt(), vectors[:, -r:].flip(1)
    long = torch.cat([part.double() @ short for part in parts]) / values.clamp(min=torch.finfo(values.dtype).tiny)
    u, v = (long, short) if is_tall else (short, long)
    signs = v.gather(0, v.abs().argmax(0, keepdim=True)).sign()
    return u * signs, values, (v * signs).t()
