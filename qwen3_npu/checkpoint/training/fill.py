"""Fill a live model's parameters from files; those in 4 bits (--qlora) are quantized on the host, one at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from qwen3_npu.checkpoint.binary.dtypes import BY_TORCH, DType
from qwen3_npu.checkpoint.mapping.source import Contents, Source, read_shard, read_tensor
from qwen3_npu.checkpoint.mapping.table import Shard, TensorSlice, hf_shapes
from qwen3_npu.checkpoint.training.live import dtype_of, to_torch
from qwen3_npu.distributed.layout import Layout, Rank
from qwen3_npu.errors import UsageError
from qwen3_npu.kernels import nf4
from qwen3_npu.model.quantized import ScalesOfTensor, fill, held

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
