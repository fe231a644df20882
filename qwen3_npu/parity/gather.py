"""The optimizer's tensors of every trained parameter, unsharded from any layout. For comparisons."""

from __future__ import annotations

import numpy as np
import torch.distributed as dist

from qwen3_npu.checkpoint.binary.dtypes import Region, as_index
from qwen3_npu.checkpoint.training import optimizer_state
from qwen3_npu.checkpoint.training.live import to_numpy
from qwen3_npu.checkpoint.training.save import Trained
from qwen3_npu.distributed.launch import model_rank

GatheredSlice = tuple[str, Region, np.ndarray]


def gather_whole(trained: Trained, key: str) -> dict[str, np.ndarray]:
    """Hugging Face (of adapters: PEFT) name -> float32 tensor, on rank 0; empty elsewhere. Every rank must call it.

    After the first step of an Adam without clipping, `exp_avg` is 1 - beta1 times the gradient.

    Args:
        key: of `optimizer_state.KEYS`.
    """
    gathered = optimizer_state.gather(trained.optimizer, optimizer_state.parameter_names(trained.chunks))
    mine: list[GatheredSlice] = []
    for shard in trained.optimized.shards(trained.layout, model_rank()):
        if (shard.chunk, shard.name) in gathered:
            view = to_numpy(gathered[shard.chunk, shard.name][key]).reshape(shard.view)
            for piece in shard.slices:
                if piece.padding:
                    continue
                part = view[as_index(piece.target)]
                mine.append((piece.hf, piece.source, part.T if piece.transposed else part))
    everyone: list[list[GatheredSlice]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    whole: dict[str, np.ndarray] = {}
    if dist.get_rank():
        return whole
    shapes = trained.optimized.shapes()
    for name, region, part in (piece for pieces in everyone for piece in pieces):
        tensor = whole.setdefault(name, np.full(shapes[name], np.nan, np.float32))
        tensor[as_index(region)] = part.reshape(tensor[as_index(region)].shape)
    return whole
