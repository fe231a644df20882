"""Which parts of the matrices of `published.py` the file of a rank holds, by Megatron's rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from qwen3_npu.checkpoint.mapping.source import Contents
from qwen3_npu.checkpoint.verify.published import (
    COLUMNS,
    HALVES,
    PADDING,
    ROWS,
    Span,
    WholeMatrix,
    layer_matrices,
    outer_matrices,
)
from qwen3_npu.distributed.layout import Layout


class StripPiece(NamedTuple):
    """A part of a Hugging Face matrix and the rows of a stored matrix that hold it.

    Attributes:
        expert: index of the stacked matrix; None if there is only one.
        copy: as in `Strip`.
    """

    hf: str
    rows: Span
    columns: Span
    place: Span
    expert: int | None = None
    copy: str = ""


class HeldTensor(NamedTuple):
    """A tensor of a rank's file. `stack`: (experts, columns, rows) of transposed matrices, else None."""

    shape: tuple[int, ...]
    pieces: list[StripPiece]
    stack: tuple[int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class ShardSizes:
    """The numbers of a layout; see `Layout`. `stages`: number of layers in a chunk of each pipeline stage."""

    tensor: int
    pipeline: int
    expert: int
    expert_tensor: int
    virtual: int
    stages: tuple[int, ...]
    noop: tuple[int, ...]
    padded_vocab: int
    stacked: bool

    @classmethod
    def of(cls, layout: Layout) -> ShardSizes:
        return cls(
            layout.tensor,
            layout.pipeline,
            layout.expert,
            expert_tensor=layout.expert_tensor,
            virtual=len(layout.chunks[0]),
            stages=tuple(len(stage[0]) for stage in layout.chunks),
            noop=tuple(layout.noop_layers),
            padded_vocab=layout.padded_vocab_size,
            stacked=layout.stacked_experts,
        )

    def model_layer(self, place: int) -> int | None:
        """Number in the model of the layer at a place, no-op layers counted; None for a no-op layer."""
        return None if place in self.noop else place - sum(noop < place for noop in self.noop)

    def layers(self, stage: int, chunk: int) -> Iterator[tuple[int, int]]:
        """(number in the chunk, number in the model) of the layers of a chunk: stages take turns, chunk after chunk."""
        before = sum(self.stages[:stage]) + chunk * sum(self.stages)
        for local in range(self.stages[stage]):
            layer = self.model_layer(before + local)
            if layer is not None:
                yield local, layer

    def ranks(self) -> dict[str, tuple[int, int, int]]:
        """Megatron's folder -> (tensor, pipeline, expert) rank of its file."""
        found = {}
        for stage in range(self.pipeline):
            for number in range(self.tensor * self.expert_tensor * self.expert):
                tensor, expert = number % self.tensor, number // self.expert_tensor % self.expert
                folder = f"mp_rank_{tensor:02d}"
                folder += f"_{stage:03d}" if self.pipeline > 1 else ""
                folder += f"_{expert:03d}" if self.expert > 1 else ""
                found[folder] = (tensor, stage, expert)
        return found


def pieces(matrix: WholeMatrix, spans: Iterable[Span], columns: Span, expert: int | None = None) -> list[StripPiece]:
    """The pieces in a stored matrix that consists of some rows and columns of a complete one."""
    found, at = [], 0
    for start, stop in spans:
        for strip in matrix.strips:
            low, high = max(start, strip.at), min(stop, strip.at + strip.rows)
            if low < high:
                rows = (strip.first + low - strip.at, strip.first + high - strip.at)
                if strip.copy == PADDING:
                    rows = (strip.first, strip.first + 1)
                place = (at + low - start, at + high - start)
                found.append(StripPiece(strip.hf, rows, columns, place, expert=expert, copy=strip.copy))
        at += stop - start
    return found


def _share(matrix: WholeMatrix, ways: int, index: int) -> tuple[list[Span], Span]:
    """The rows and columns that one of several ranks holds."""

    def part(size: int, start: int = 0) -> Span:
        return start + size // ways * index, start + size // ways * (index + 1)

    half, columns = matrix.rows // 2, (0, matrix.columns)
    if matrix.sharded == ROWS:
        return [part(matrix.rows)], columns
    if matrix.sharded == HALVES:
        return [part(half), part(half, half)], columns
    return [(0, matrix.rows)], part(matrix.columns) if matrix.sharded == COLUMNS else columns


def rank_tensors(contents: Contents, sizes: ShardSizes, rank: tuple[int, int, int]) -> dict[str, HeldTensor]:
    """`model.NAME` (`model0.NAME`, ..) -> each tensor in the file of a (tensor, pipeline, expert) rank."""
    tensor, stage, expert = rank
    found: dict[str, HeldTensor] = {}
    count = contents.arch.num_experts // sizes.expert
    mine = range(expert * count, (expert + 1) * count)
    for chunk in range(sizes.virtual):
        key = "model." if sizes.virtual == 1 else f"model{chunk}."
        first, last = stage == chunk == 0, stage == sizes.pipeline - 1 and chunk == sizes.virtual - 1
        outer = outer_matrices(contents, sizes.padded_vocab, first=first, last=last, copies=sizes.pipeline > 1)
        for matrix in outer:
            found[key + matrix.name] = _held([matrix], sizes.tensor, tensor)
        for local, layer in sizes.layers(stage, chunk):
            at = f"{key}decoder.layers.{local}."
            stacks: dict[str, list[WholeMatrix]] = {}
            for matrix in layer_matrices(contents, layer, mine, stacked=sizes.stacked):
                if "local_experts" not in matrix.name:
                    found[at + matrix.name] = _held([matrix], sizes.tensor, tensor)
                elif sizes.stacked:
                    stacks.setdefault(matrix.name.split(".", 4)[4], []).append(matrix)
                else:
                    _, _, _, number, rest = matrix.name.split(".", 4)
                    name = f"{at}mlp.experts.local_experts.{int(number) - mine.start}.{rest}"
                    found[name] = _held([matrix], sizes.expert_tensor, tensor % sizes.expert_tensor)
            for rest, matrices in stacks.items():
                shard = sizes.expert_tensor, tensor % sizes.expert_tensor
                found[f"{at}mlp.experts.{_STACKED[rest]}"] = _held(matrices, *shard, stacked=rest[:10])
    return found


_STACKED = {
    "linear_fc1.weight": "weight1",
    "linear_fc1.lora_A.default.weight": "weight1_lora_a",
    "linear_fc1.lora_B.default.weight": "weight1_lora_b",
    "linear_fc2.weight": "weight2",
    "linear_fc2.lora_A.default.weight": "weight2_lora_a",
    "linear_fc2.lora_B.default.weight": "weight2_lora_b",
    "linear_fc1.lora_A.initial.weight": "weight1_lora_a_initial",
    "linear_fc1.lora_B.initial.weight": "weight1_lora_b_initial",
    "linear_fc2.lora_A.initial.weight": "weight2_lora_a_initial",
    "linear_fc2.lora_B.initial.weight": "weight2_lora_b_initial",
    "linear_fc1.lora_magnitude_vector.default.weight": "weight1_lora_magnitude_vector",
    "linear_fc2.lora_magnitude_vector.default.weight": "weight2_lora_magnitude_vector",
}


def _held(matrices: list[WholeMatrix], ways: int, index: int, *, stacked: str = "") -> HeldTensor:
    shares = [_share(matrix, ways, index) for matrix in matrices]
    (spans, (left, right)), count = shares[0], len(matrices)
    rows, columns = sum(stop - start for start, stop in spans), right - left
    parts = [
        piece
        for number, (matrix, share) in enumerate(zip(matrices, shares, strict=True))
        for piece in pieces(matrix, *share, number if stacked or matrix.is_turned else None)
    ]
    if matrices[0].is_turned:
        return HeldTensor((columns, rows), parts, (1, columns, rows))
    if not stacked:
        return HeldTensor((rows,) if matrices[0].is_vector else (rows, columns), parts)
    shape: tuple[int, ...] = (columns, count * rows) if stacked == "linear_fc1" else (count * columns, rows)
    if matrices[0].is_vector:
        shape = (count * rows,)
    return HeldTensor(shape, parts, (count, columns, rows))
