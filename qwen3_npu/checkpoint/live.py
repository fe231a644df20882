"""Weights between files and a live, sharded model, by regions: no conversion step, no more than a rank's share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen3_npu.checkpoint.lora_table import Contents
from qwen3_npu.checkpoint.pt_writer import PtWriter, Tensor
from qwen3_npu.checkpoint.source import Source, read_shard
from qwen3_npu.checkpoint.tensors import BF16, BY_TORCH, U8, DType
from qwen3_npu.distributed.layout import Layout, Rank


def dtype_of(tensor: torch.Tensor) -> DType:
    """The tensor's dtype as the file formats know it."""
    return U8 if tensor.dtype is torch.uint8 else BY_TORCH[str(tensor.dtype).removeprefix("torch.")]


def to_torch(array: np.ndarray, dtype: DType) -> torch.Tensor:
    """The same memory as a torch tensor."""
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if dtype is BF16 else torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor on the host, bfloat16 as uint16; the same memory if it is there already."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype is torch.bfloat16 else tensor.numpy()


@torch.no_grad()
def load_weights(
    source: Source,
    layout: Layout,
    rank: Rank,
    chunks: Sequence[torch.nn.Module],
    contents: Contents | None = None,
    loads: Callable[[str], bool] = lambda name: True,
) -> None:
    """Fill this rank's parameters.

    Args:
        chunks: the model chunks, not wrapped.
        contents: what the model is made of; by default weights without LoRA updates.
        loads: which parameters are filled, by their names.
    """
    contents = contents or Contents(source.arch)
    for chunk, model in enumerate(chunks):
        parameters = dict(model.named_parameters())
        wanted = {s.name: s for s in contents.shards(layout, rank) if s.chunk == chunk}
        if wanted.keys() != parameters.keys():
            raise AssertionError(f"weight table and model disagree: {sorted(wanted.keys() ^ parameters.keys())[:5]}")
        for name, shard in wanted.items():
            if not loads(name):
                continue
            dtype = dtype_of(parameters[name])
            parameters[name].copy_(to_torch(read_shard(source, shard, dtype), dtype))


def write_content(path: Path, content: Any) -> None:
    """Write nested dicts and lists with torch tensors in them as a torch checkpoint, flushed to disk.

    One tensor at a time is in host memory.
    """
    tensors: list[torch.Tensor] = []

    def announce(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            return Tensor(dtype_of(value), tuple(value.shape))
        if isinstance(value, dict):
            return {key: announce(item) for key, item in value.items()}
        return [announce(item) for item in value] if isinstance(value, list) else value

    writer = PtWriter(path, announce(content))
    for tensor in tensors:
        writer.write(to_numpy(tensor))
    writer.close()
