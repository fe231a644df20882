"""Copy weights between files and a live, sharded model, by regions: no conversion step, and only a rank's share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from qwen3_npu.checkpoint.binary.dtypes import BF16, BY_TORCH, U8, DType, Region, as_index, intersect, sizes
from qwen3_npu.checkpoint.binary.torch_zip_write import PtWriter, Tensor
from qwen3_npu.checkpoint.formats.open import Peers
from qwen3_npu.checkpoint.mapping.source import Contents, ShardReader, SliceLocation, read_shard
from qwen3_npu.checkpoint.mapping.table import Shard
from qwen3_npu.distributed.agreement import first_problem
from qwen3_npu.distributed.layout import Layout, Rank
from qwen3_npu.errors import Stopped


def dtype_of(tensor: torch.Tensor) -> DType:
    """The tensor's dtype as the file formats know it."""
    return U8 if tensor.dtype is torch.uint8 else BY_TORCH[str(tensor.dtype).removeprefix("torch.")]


def to_torch(array: np.ndarray, dtype: DType) -> torch.Tensor:
    """The same memory as a torch tensor."""
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if dtype is BF16 else torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor on the host, bfloat16 as uint16; the same memory if it is on the host already."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype is torch.bfloat16 else tensor.numpy()


def copied_to_host(content: object) -> Any:
    """Nested dicts and lists, their tensors copied to the host, so that training does not change them."""
    if isinstance(content, torch.Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return {key: copied_to_host(item) for key, item in content.items()}
    return [copied_to_host(item) for item in content] if isinstance(content, list) else content


class LiveTensors(ShardReader[None]):
    """Tensors of one rank in memory, of its parameters' shapes, read as regions of Hugging Face tensors.

    Args:
        tensors: (virtual chunk, name) -> tensor, of some or all parameters.
    """

    def __init__(
        self, tensors: Mapping[tuple[int, str], torch.Tensor], contents: Contents, layout: Layout, rank: Rank
    ) -> None:
        self.tensors, self.arch, self.contents = tensors, contents.arch, contents
        shards = [shard for shard in contents.shards(layout, rank) if (shard.chunk, shard.name) in tensors]
        super().__init__(((None, shard) for shard in shards), "this rank")

    def shard(self, shard: Shard, dtype: DType) -> np.ndarray:
        """A Megatron tensor of this rank: the live one, or, where a format stores other tensors, joined from slices."""
        tensor = self.tensors.get((shard.chunk, shard.name))
        if tensor is not None and tuple(tensor.shape) == shard.shape and dtype_of(tensor) is dtype:
            return to_numpy(tensor)
        return read_shard(self, shard, dtype)

    def find(self, holder: SliceLocation) -> torch.Tensor:
        return self.tensors[holder.shard.chunk, holder.shard.name]

    def stored_dtype(self, holder: SliceLocation, tensor: torch.Tensor) -> DType:
        return dtype_of(tensor)

    def dtype(self, name: str) -> DType:
        # A rank may hold nothing but padding of a vocabulary; all its tensors have one dtype.
        return super().dtype(name) if name in self.places else dtype_of(next(iter(self.tensors.values())))

    def read(self, name: str, region: Region) -> np.ndarray:
        if any(intersect(region, held) for held in self.places.get(name, ())):
            return super().read(name, region)
        # Padding repeats the vocabulary's last row, which another rank holds; what is in padded rows is never used.
        return np.zeros(sizes(region), self.dtype(name).carrier)

    def read_stored(self, holder: SliceLocation, tensor: torch.Tensor, region: Region) -> np.ndarray:
        return to_numpy(tensor.detach().view(holder.shard.view)[as_index(region)])

    def close(self) -> None:
        """Nothing to close."""


def parameters_of(chunks: Sequence[torch.nn.Module]) -> dict[tuple[int, str], torch.nn.Parameter]:
    """(virtual chunk, name) -> parameter."""
    return {(i, name): p for i, chunk in enumerate(chunks) for name, p in chunk.named_parameters()}


def write_content(path: Path, content: object) -> None:
    """Write nested dicts and lists with torch tensors in them as a torch checkpoint, flushed to disk.

    One tensor at a time is in host memory.
    """
    announced, tensors = announce(content)
    write_tensors(PtWriter(path, announced), tensors)


def announce(content: object) -> tuple[Any, list[torch.Tensor]]:
    """The content with its tensors replaced by placeholders, and the tensors in order."""
    tensors: list[torch.Tensor] = []

    def described(value: object) -> object:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            return Tensor(dtype_of(value), tuple(value.shape))
        if isinstance(value, dict):
            return {key: described(item) for key, item in value.items()}
        return [described(item) for item in value] if isinstance(value, list) else value

    return described(content), tensors


def write_tensors(writer: PtWriter, tensors: list[torch.Tensor]) -> None:
    """Write all announced tensors, and close the writer."""
    for tensor in tensors:
        writer.write(to_numpy(tensor))
    writer.close()


@torch.no_grad()
def check_finite(named: Iterable[tuple[str, torch.Tensor]], what: str) -> None:
    """Check that the tensors of all ranks are finite: one reduction a tensor, one transfer. Every rank must call this.

    Raises:
        Stopped: on every rank, if a tensor is not finite; the message begins with `what`, the action that is dropped.
    """
    tensors = [(name, tensor.detach()) for name, tensor in named if tensor.numel()]
    largest = [torch.linalg.vector_norm(tensor, torch.inf).float() for _, tensor in tensors]
    finite = torch.isfinite(torch.stack(largest)).tolist() if largest else []
    names = [name for name, _ in tensors]
    mine = next((name for name, good in zip(names, finite, strict=True) if not good), None)
    found = first_problem(mine)
    if found is not None:
        rank, name = found
        raise Stopped(f"{what}: {name} holds NaN or infinite values (rank {rank}); the checkpoints before are kept")


class Ranks(Peers):
    """All processes of a process group."""

    def __init__(self) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()

    def agree(self, value: object) -> object:
        held = [value]
        dist.broadcast_object_list(held, 0)
        return held[0]

    def first_problem(self, problem: str | None) -> str | None:
        found = first_problem(problem)
        return found[1] if found is not None else None
