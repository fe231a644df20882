"""Copy weights between files and a live, sharded model, by regions: no conversion step, and only a rank's share.

Weights in 4 bits (--qlora) are quantized on the host, one at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from qwen3_npu.checkpoint.binary.dtypes import BF16, BY_TORCH, U8, DType, Region, as_index, intersect, sizes
from qwen3_npu.checkpoint.binary.torch_zip_write import PtWriter, Tensor
from qwen3_npu.checkpoint.formats.open import Peers
from qwen3_npu.checkpoint.mapping.source import Contents, ShardReader, SliceLocation, Source, read_shard, read_tensor
from qwen3_npu.checkpoint.mapping.table import Shard, TensorSlice, hf_shapes
from qwen3_npu.distributed.agreement import first_problem
from qwen3_npu.distributed.layout import Layout, Rank
from qwen3_npu.errors import Stopped, UsageError
from qwen3_npu.kernels import nf4
from qwen3_npu.model.quantized import ScalesOfTensor, fill, held


def dtype_of(tensor: torch.Tensor) -> DType:
    """The tensor's dtype as the file formats know it."""
    return by_torch(tensor.dtype)


def by_torch(dtype: torch.dtype) -> DType:
    """torch's dtype as the file formats know it."""
    return U8 if dtype is torch.uint8 else BY_TORCH[str(dtype).removeprefix("torch.")]


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


_shapes = functools.lru_cache(maxsize=1)(hf_shapes)


@torch.no_grad()
def load_weights(
    source: Source,
    layout: Layout,
    rank: Rank,
    chunks: Sequence[torch.nn.Module],
    *,
    contents: Contents | None = None,
    loads: Callable[[str], bool] = lambda name: True,
    change: Callable[[torch.nn.Parameter, torch.Tensor], torch.Tensor] = lambda parameter, weight: weight,
    allow_nonfinite: bool = False,
) -> None:
    """Fill this rank's parameters.

    Args:
        chunks: the model chunks, not wrapped.
        contents: what the model is made of; by default weights without LoRA adapters.
        loads: which parameters are filled, by their names.
        change: (parameter, its weight on the host, in its shard's view) -> the value that it is filled with.
        allow_nonfinite: take NaN and infinite values too (--allow-nonfinite-weights).

    Raises:
        UsageError: a weight is not finite, in its file or in the parameter's dtype.
    """
    contents = contents or Contents(source.arch)
    extremes: dict[str, torch.Tensor] = {}
    for chunk, model in enumerate(chunks):
        parameters = dict(model.named_parameters())
        wanted = {s.name: s for s in contents.shards(layout, rank) if s.chunk == chunk}
        if wanted.keys() != parameters.keys():
            raise AssertionError(f"weight table and model disagree: {sorted(wanted.keys() ^ parameters.keys())[:5]}")
        for name, shard in wanted.items():
            if not loads(name):
                continue
            filled = _fill(parameters[name], source, shard, functools.partial(change, parameters[name]))
            if not allow_nonfinite:
                # Both are NaN if anything is; they stay on the device, which is waited for once.
                label = " + ".join(dict.fromkeys(piece.hf for piece in shard.slices)) or name
                # The scales of 4-bit weights are on the host.
                extremes[label] = torch.stack([filled.min(), filled.max()]).float().to(parameters[name].device)
    if extremes:
        finite = torch.stack(list(extremes.values())).isfinite().all(-1).tolist()
        if wrong := [label for label, is_finite in zip(extremes, finite, strict=True) if not is_finite]:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            kind = f"NaN or infinity, in {dtype_name(chunks)}"
            raise UsageError(
                f"{source} holds weights that are not finite ({kind}): {wrong[0]}{more}; "
                "load an earlier checkpoint, or continue with --allow-nonfinite-weights"
            )


def _fill(
    parameter: torch.nn.Parameter,
    source: Source,
    shard: Shard,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Read a weight into a parameter. The result has NaN or infinite values if the weight has some."""
    kind = held(parameter)
    dtype = dtype_of(parameter) if kind is None else BY_TORCH[str(kind.dtype).removeprefix("torch.")]
    weight = change(to_torch(read_shard(source, shard, dtype), dtype).view(shard.view))
    if kind is None:
        parameter.copy_(weight.reshape(shard.shape))
        return parameter
    turned = weight.transpose(1, 2) if weight.dim() == 3 else weight  # experts: as Hugging Face has them
    return fill(parameter, turned, functools.partial(_scales_of_tensors, source, shard, dtype))


def dtype_name(chunks: Sequence[torch.nn.Module]) -> str:
    """The dtype of a model's parameters, for messages."""
    floats = (p.dtype for chunk in chunks for p in chunk.parameters() if p.is_floating_point())
    return str(next(floats)).removeprefix("torch.")


def _scales_of_tensors(source: Source, shard: Shard, dtype: DType, local: torch.Tensor) -> list[ScalesOfTensor]:
    """The scales of complete tensors, which double quantization quantizes together.

    The parts that other ranks hold are read too. So every layout has the same scales, and no rank waits for another.
    """
    by_name: dict[str, list[TensorSlice]] = {}
    for piece in shard.slices:
        by_name.setdefault(piece.hf, []).append(piece)
    rows = shard.view[-1] * shard.view[0] if len(shard.view) == 3 else shard.view[0]
    local = local.view(rows, -1)
    return [
        _scales_of(source, name, _shapes(source.arch)[name], pieces, shard=shard, local=local, dtype=dtype)
        for name, pieces in by_name.items()
    ]


def _scales_of(
    source: Source,
    name: str,
    shape: tuple[int, ...],
    pieces: Sequence[TensorSlice],
    *,
    shard: Shard,
    local: torch.Tensor,
    dtype: DType,
) -> ScalesOfTensor:
    parts = [(_rows_of(p, shard), slice(*p.source[0]), p.source[1][0] // nf4.BLOCK) for p in pieces]
    width = local.shape[1]
    values = torch.full((shape[0], shape[1] // nf4.BLOCK), -1.0)
    for mine, rows, column in parts:
        values[rows, column : column + width] = local[mine]
    if bool((values < 0).any()):
        whole = to_torch(read_tensor(source, name, shape, dtype), dtype)
        values = nf4.largest(whole).view_as(values)
    return ScalesOfTensor(values, parts)


def _rows_of(piece: TensorSlice, shard: Shard) -> slice:
    """The rows of a slice in the matrix that is quantized: [.., in], with experts stacked."""
    if len(shard.view) == 2:
        return slice(*piece.target[0])
    (expert, _), _, (start, stop) = piece.target
    return slice(expert * shard.view[2] + start, expert * shard.view[2] + stop)
