"""The rules of the weight table: which slices of Hugging Face tensors make up one Megatron tensor.

A rule returns slices. A slice says which rows and columns of a Hugging Face tensor are which of the Megatron tensor.
Pure arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from qwen3_npu.checkpoint.binary.dtypes import Region
from qwen3_npu.distributed.layout import Layout, Rank
from qwen3_npu.model.arch import Qwen3Arch


@dataclasses.dataclass(frozen=True)
class TensorSlice:
    """A part of one Hugging Face tensor and its place in a Megatron tensor.

    Attributes:
        hf: the Hugging Face tensor's name.
        source: the part of it.
        target: its place in the Megatron tensor's `view`; the same size as `source` (leading dimensions of size 1
            may be added).
        transposed: rows of the source are columns of the target.
        padding: it fills rows that the model does not have and is never copied back.
    """

    hf: str
    source: Region
    target: Region
    transposed: bool = False
    padding: bool = False

    def part(self, wanted: Region) -> Region:
        """The place of a part of `source` in the Megatron tensor's view."""
        offsets = [(start - o, stop - o) for (start, stop), (o, _) in zip(wanted, self.source, strict=True)]
        if self.transposed:
            offsets.reverse()
        lead = len(self.target) - len(offsets)
        inner = ((o + start, o + stop) for (start, stop), (o, _) in zip(offsets, self.target[lead:], strict=True))
        return self.target[:lead] + tuple(inner)


@dataclasses.dataclass(frozen=True)
class ShardContext:
    """The input of a rule: the model, its layout, and the rank and layer of the shard."""

    arch: Qwen3Arch
    layout: Layout
    rank: Rank


SliceRule = Callable[[ShardContext, Sequence[str]], tuple[tuple[int, ...], tuple[int, ...], list[TensorSlice]]]


def _span(size: int, parts: int, index: int) -> tuple[int, int]:
    return size * index // parts, size * (index + 1) // parts


def _stack(names: Sequence[str], spans: Sequence[tuple[int, int]], columns: tuple[int, int]) -> tuple:
    """Row spans of stacked matrices that have the same columns."""
    slices, row = [], 0
    for name, (start, stop) in zip(names, spans, strict=True):
        slices.append(
            TensorSlice(name, ((start, stop), columns), ((row, row + stop - start), (0, columns[1] - columns[0])))
        )
        row += stop - start
    shape = (row, columns[1] - columns[0])
    return shape, shape, slices


def replicated(size: Callable[[Qwen3Arch], int]) -> SliceRule:
    """A vector that every tensor-parallel rank has."""

    def rule(at: ShardContext, hf: Sequence[str]) -> tuple:
        n = size(at.arch)
        return (n,), (n,), [TensorSlice(hf[0], ((0, n),), ((0, n),))]

    return rule


def vocabulary(at: ShardContext, hf: Sequence[str]) -> tuple:
    """Rows of the padded vocabulary; rows past the model's own repeat its last one, as MindSpeed-LLM 2.1.0 does."""
    hidden, vocab = (0, at.arch.hidden_size), at.arch.vocab_size
    start, stop = _span(at.layout.padded_vocab_size, at.layout.tensor, at.rank.tensor)
    real = min(max(stop, start), vocab) - start
    slices = [TensorSlice(hf[0], ((start, start + real), hidden), ((0, real), hidden))] if real > 0 else []
    for row in range(max(real, 0), stop - start):
        slices.append(TensorSlice(hf[0], ((vocab - 1, vocab), hidden), ((row, row + 1), hidden), padding=True))
    shape = (stop - start, at.arch.hidden_size)
    return shape, shape, slices


def qkv(at: ShardContext, hf: Sequence[str]) -> tuple:
    """Per key/value head: its query heads, then the key head, then the value head; rows sharded evenly across TP.

    With at most as many ranks as key/value heads, a rank has whole heads. With more, it has a part of the rows of one
    head, as in megatron-core.
    """
    arch, d = at.arch, at.arch.head_dim
    group_rows = (arch.heads_per_group + 2) * d
    start, stop = _span(arch.num_key_value_heads * group_rows, at.layout.tensor, at.rank.tensor)
    names: list[str] = []
    spans: list[tuple[int, int]] = []
    for group in range(start // group_rows, -(-stop // group_rows)):
        row = group * group_rows
        for name, rows in zip(hf, (arch.heads_per_group * d, d, d), strict=True):
            first, last = max(start, row), min(stop, row + rows)
            if first < last:
                names.append(name)
                spans.append((group * rows + first - row, group * rows + last - row))
            row += rows
    return _stack(names, spans, (0, arch.hidden_size))


def qkv_bias(at: ShardContext, hf: Sequence[str]) -> tuple:
    """The bias of `qkv`, in the order of its rows."""
    (rows, _), _, parts = qkv(at, hf)
    parts = [TensorSlice(part.hf, part.source[:1], part.target[:1]) for part in parts]
    return (rows,), (rows,), parts


def columns(width: Callable[[Qwen3Arch], int]) -> SliceRule:
    """A matrix whose columns are sharded across TP (row-parallel linear)."""

    def rule(at: ShardContext, hf: Sequence[str]) -> tuple:
        return _stack(hf, [(0, at.arch.hidden_size)], _span(width(at.arch), at.layout.tensor, at.rank.tensor))

    return rule


def gate_up(at: ShardContext, hf: Sequence[str]) -> tuple:
    """Gate above up, each sharded across TP: the local matrix is [gate_local; up_local]."""
    span = _span(at.arch.intermediate_size, at.layout.tensor, at.rank.tensor)
    return _stack(hf, [span, span], (0, at.arch.hidden_size))


def one_row(at: ShardContext, hf: Sequence[str]) -> tuple:
    return _stack(hf, [(0, 1)], (0, at.arch.hidden_size))


def router(at: ShardContext, hf: Sequence[str]) -> tuple:
    return _stack(hf, [(0, at.arch.num_experts)], (0, at.arch.hidden_size))


def local_experts(at: ShardContext) -> tuple[range, tuple[int, int]]:
    """This rank's experts, and its span of their FFN width."""
    span = _span(at.arch.moe_intermediate_size, at.layout.expert_tensor, at.rank.expert_tensor)
    return range(*_span(at.arch.num_experts, at.layout.expert, at.rank.expert)), span


def expert_gate_up(at: ShardContext, hf: Sequence[str]) -> tuple:
    """One expert's gate above its up, as in a dense layer."""
    _, span = local_experts(at)
    return _stack(hf, [span, span], (0, at.arch.hidden_size))


def expert_down(at: ShardContext, hf: Sequence[str]) -> tuple:
    """One expert's down projection."""
    return _stack(hf, [(0, at.arch.hidden_size)], local_experts(at)[1])


def experts_fc1(at: ShardContext, hf: Sequence[str]) -> tuple:
    """All local experts' [gate | up], transposed: memory (expert, hidden, 2 * ffn), stored as (hidden, rest)."""
    experts, (start, stop) = local_experts(at)
    hidden, width = at.arch.hidden_size, stop - start
    slices = [
        TensorSlice(
            name.format(e=expert),
            ((start, stop), (0, hidden)),
            ((local, local + 1), (0, hidden), (half * width, (half + 1) * width)),
            transposed=True,
        )
        for local, expert in enumerate(experts)
        for half, name in enumerate(hf)
    ]
    return (hidden, len(experts) * 2 * width), (len(experts), hidden, 2 * width), slices


def experts_fc2(at: ShardContext, hf: Sequence[str]) -> tuple:
    """All local experts' down projections, transposed: memory (expert, ffn, hidden), stored as (rest, hidden)."""
    experts, (start, stop) = local_experts(at)
    hidden, width = at.arch.hidden_size, stop - start
    slices = [
        TensorSlice(
            hf[0].format(e=expert),
            ((0, hidden), (start, stop)),
            ((local, local + 1), (0, width), (0, hidden)),
            transposed=True,
        )
        for local, expert in enumerate(experts)
    ]
    return (len(experts) * width, hidden), (len(experts), width, hidden), slices


def attention_width(arch: Qwen3Arch) -> int:
    return arch.num_attention_heads * arch.head_dim


def ffn_width(arch: Qwen3Arch) -> int:
    return arch.intermediate_size
