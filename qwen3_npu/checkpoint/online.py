"""Weights between a `Source` and a live, sharded model: by regions, no conversion step, no more than a rank's share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qwen3_npu.checkpoint.source import Source, read_shard
from qwen3_npu.checkpoint.tensors import BF16, BY_TORCH, DType
from qwen3_npu.checkpoint.weights import shards
from qwen3_npu.distributed.layout import Layout, Rank
from qwen3_npu.model.arch import Qwen3Arch


def to_torch(array: np.ndarray, dtype: DType) -> torch.Tensor:
    """The same memory as a torch tensor."""
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if dtype is BF16 else torch.from_numpy(array)


@torch.no_grad()
def load_weights(
    source: Source, arch: Qwen3Arch, layout: Layout, rank: Rank, chunks: Sequence[torch.nn.Module]
) -> None:
    """Fill this rank's parameters.

    Args:
        chunks: the model chunks, not wrapped.
    """
    for chunk, model in enumerate(chunks):
        parameters = dict(model.named_parameters())
        wanted = {s.name: s for s in shards(arch, layout, rank) if s.chunk == chunk}
        if wanted.keys() != parameters.keys():
            raise AssertionError(f"weight table and model disagree: {sorted(wanted.keys() ^ parameters.keys())[:5]}")
        for name, shard in wanted.items():
            parameter = parameters[name]
            dtype = BY_TORCH[str(parameter.dtype).removeprefix("torch.")]
            parameter.copy_(to_torch(read_shard(source, shard, dtype), dtype))
