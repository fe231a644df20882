"""Context parallelism: the sequence sharded across ranks, also inside attention. Two algorithms, one interface."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist

from qwen3_npu.distributed import ring, ulysses
from qwen3_npu.kernels import Kernels

SHARD_INDICES: dict[str, Callable[[int, int, int], torch.Tensor]] = {
    "ulysses_cp_algo": ulysses.shard_indices,
    "megatron_cp_algo": ring.shard_indices,
}


@dataclasses.dataclass(frozen=True)
class ContextParallel:
    """The attention of a rank that holds a part of the sequence.

    Attributes:
        algorithm: MindSpeed-LLM's name for it.
    """

    algorithm: str
    kernels: Kernels

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        group: dist.ProcessGroup,
        *,
        scale: float,
        cu_seqlens: tuple[int, ...] | None,
        dropout: float,
    ) -> torch.Tensor:
        """[s, b, n, d] of the local tokens; `cu_seqlens` are boundaries in the full sequence."""
        if self.algorithm == "megatron_cp_algo":
            boundaries = cu_seqlens or (0, q.shape[0] * group.size())
            return ring.attention(q, k, v, boundaries=boundaries, scale=scale, kernels=self.kernels, group=group)

        def whole(q: object, k: object, v: object) -> torch.Tensor:
            return self.kernels.attention(q, k, v, scale=scale, cu_seqlens=cu_seqlens, dropout=dropout)

        return ulysses.attention(whole, q, k, v, group=group)


def shard(fields: dict[str, torch.Tensor], algorithm: str, size: int, rank: int) -> dict[str, torch.Tensor]:
    """This rank's part of [b, s] tensors; labels must be shifted already, so none is lost at a boundary."""
    if size == 1:
        return fields
    length = next(iter(fields.values())).shape[1]
    indices = SHARD_INDICES[algorithm](length, size, rank)
    return {name: tensor[:, indices] for name, tensor in fields.items()}
