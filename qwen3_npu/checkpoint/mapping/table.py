"""The weight table: every Megatron tensor of a model, and where each part of it lies in the Hugging Face tensors.

One table serves both directions. A row names the rule that says which slices make up its tensor: which rows and columns
of a Hugging Face tensor are which of the Megatron tensor. Conversion to Megatron copies slices forward, conversion to
Hugging Face copies them backward, resharding does both, and loading copies them into the parameters of a live model.
Pure arithmetic: no torch, no files, no process groups.

Names and layouts are those of MindSpeed-LLM's "local" models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

from qwen3_npu.checkpoint.binary.dtypes import Region
from qwen3_npu.distributed.layout import NOOP, Layout, Rank, single_layout
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


@dataclasses.dataclass(frozen=True)
class Shard:
    """One tensor of one rank's Megatron checkpoint.

    Attributes:
        name: local name, e.g. `decoder.layers.3.mlp.linear_fc2.weight`.
        shape: as stored.
        view: the shape to which `slices` refer; the same elements in the same order.
        chunk: virtual pipeline chunk that holds it.
        layer: the model's layer number, or None outside the layers.
    """

    name: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    slices: tuple[TensorSlice, ...]
    chunk: int
    layer: int | None


FIRST, LAYER, LAST = "first stage", "each layer", "last stage"


@dataclasses.dataclass(frozen=True)
class WeightRow:
    """One row of the table: Megatron name, Hugging Face names, slices, pipeline stage, and which models have it.

    The Hugging Face names are the usual ones; a family may have others. In them, {l} is the layer's number, {e} an
    expert's number in the model and {k} its number on the rank.
    """

    megatron: str
    hf: tuple[str, ...]
    rule: SliceRule
    where: str = LAYER
    when: Callable[[Qwen3Arch, Layout], bool] = lambda arch, layout: True


def _dense(arch: Qwen3Arch, layout: Layout) -> bool:
    return not arch.is_moe


def _moe(arch: Qwen3Arch, layout: Layout) -> bool:
    return arch.is_moe


def _stacked(arch: Qwen3Arch, layout: Layout) -> bool:
    return arch.is_moe and layout.stacked_experts


def _single_experts(arch: Qwen3Arch, layout: Layout) -> bool:
    return arch.is_moe and not layout.stacked_experts


def _qk_norm(arch: Qwen3Arch, layout: Layout) -> bool:
    return arch.family.qk_norm


def _qkv_bias(arch: Qwen3Arch, layout: Layout) -> bool:
    return arch.family.qkv_bias


def _o_bias(arch: Qwen3Arch, layout: Layout) -> bool:
    return arch.family.o_bias


def _hidden(arch: Qwen3Arch) -> int:
    return arch.hidden_size


def _head(arch: Qwen3Arch) -> int:
    return arch.head_dim


_LAYER = "model.layers.{l}."
_ATTENTION, _MLP, _EXPERT = _LAYER + "self_attn.", _LAYER + "mlp.", _LAYER + "mlp.experts.{e}."
_GATE_UP = (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight")
_DOWN = (_EXPERT + "down_proj.weight",)
_ONE_EXPERT = "mlp.experts.local_experts.{k}."

EMBEDDING = WeightRow("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary, FIRST)
OUTPUT = WeightRow(
    "output_layer.weight", ("lm_head.weight",), vocabulary, LAST, when=lambda arch, layout: not arch.reward
)
# The head of a reward model, whole on every rank of the last stage.
SCORE = WeightRow("score.weight", ("score.weight",), one_row, LAST, when=lambda arch, layout: arch.reward)

TABLE: tuple[WeightRow, ...] = (
    EMBEDDING,
    WeightRow("input_layernorm.weight", (_LAYER + "input_layernorm.weight",), replicated(_hidden)),
    WeightRow("self_attention.linear_qkv.weight", tuple(f"{_ATTENTION}{x}_proj.weight" for x in "qkv"), qkv),
    WeightRow(
        "self_attention.linear_qkv.bias", tuple(f"{_ATTENTION}{x}_proj.bias" for x in "qkv"), qkv_bias, when=_qkv_bias
    ),
    WeightRow("self_attention.q_layernorm.weight", (_ATTENTION + "q_norm.weight",), replicated(_head), when=_qk_norm),
    WeightRow("self_attention.k_layernorm.weight", (_ATTENTION + "k_norm.weight",), replicated(_head), when=_qk_norm),
    WeightRow("self_attention.linear_proj.weight", (_ATTENTION + "o_proj.weight",), columns(attention_width)),
    WeightRow("self_attention.linear_proj.bias", (_ATTENTION + "o_proj.bias",), replicated(_hidden), when=_o_bias),
    WeightRow("pre_mlp_layernorm.weight", (_LAYER + "post_attention_layernorm.weight",), replicated(_hidden)),
    WeightRow("mlp.linear_fc1.weight", (_MLP + "gate_proj.weight", _MLP + "up_proj.weight"), gate_up, when=_dense),
    WeightRow("mlp.linear_fc2.weight", (_MLP + "down_proj.weight",), columns(ffn_width), when=_dense),
    WeightRow("mlp.router.weight", (_MLP + "gate.weight",), router, when=_moe),
    WeightRow("mlp.experts.weight1", _GATE_UP, experts_fc1, when=_stacked),
    WeightRow("mlp.experts.weight2", _DOWN, experts_fc2, when=_stacked),
    WeightRow(_ONE_EXPERT + "linear_fc1.weight", _GATE_UP, expert_gate_up, when=_single_experts),
    WeightRow(_ONE_EXPERT + "linear_fc2.weight", _DOWN, expert_down, when=_single_experts),
    WeightRow("decoder.final_layernorm.weight", ("model.norm.weight",), replicated(_hidden), LAST),
    OUTPUT,
    SCORE,
)


def shards(arch: Qwen3Arch, layout: Layout, rank: Rank) -> Iterator[Shard]:
    """Every tensor of one rank's checkpoint, in the model's order, with the slices it is made of.

    A tied output layer has no weight of its own on one pipeline stage; on several, the last stage holds a copy of the
    embedding, which is not copied back.
    """
    at = ShardContext(arch, layout, rank)
    rows = [row for row in TABLE if row.when(arch, layout)]
    for chunk, layers in enumerate(layout.chunks[rank.pipeline]):
        if rank.pipeline == 0 and chunk == 0:
            yield from (
                _shard(at, row, row.megatron, row.hf, chunk=chunk, layer=None) for row in rows if row.where == FIRST
            )
        for local, layer in enumerate(layers):
            if layer != NOOP:
                yield from _layer_shards(at, [row for row in rows if row.where == LAYER], chunk, local, layer=layer)
        if rank.pipeline == layout.pipeline - 1 and chunk == layout.virtual - 1:
            for row in rows:
                if row.where == LAST and not (row is OUTPUT and arch.tie_word_embeddings):
                    yield _shard(at, row, row.megatron, row.hf, chunk=chunk, layer=None)
            if arch.tie_word_embeddings and layout.pipeline > 1:
                yield _copy(_shard(at, OUTPUT, OUTPUT.megatron, EMBEDDING.hf, chunk=chunk, layer=None))


def _layer_shards(
    at: ShardContext, rows: Sequence[WeightRow], chunk: int, local: int, *, layer: int
) -> Iterator[Shard]:
    for row in rows:
        # A row per expert has {k} in its name; every other row stands for itself (and may name all experts).
        experts = enumerate(local_experts(at)[0]) if "{k}" in row.megatron else [(0, "{e}")]
        for k, expert in experts:
            name = f"decoder.layers.{local}.{row.megatron.format(k=k)}"
            yield _shard(at, row, name, [h.format(l=layer, e=expert) for h in row.hf], chunk=chunk, layer=layer)


def _shard(at: ShardContext, row: WeightRow, name: str, hf: Sequence[str], *, chunk: int, layer: int | None) -> Shard:
    shape, view, slices = row.rule(at, [at.arch.family.hf_name(standard) for standard in hf])
    return Shard(name=name, shape=shape, view=view, slices=tuple(slices), chunk=chunk, layer=layer)


def _copy(shard: Shard) -> Shard:
    return dataclasses.replace(shard, slices=tuple(dataclasses.replace(p, padding=True) for p in shard.slices))


def covered(shards: Iterable[Shard]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every Hugging Face tensor of an unsharded model: it ends where its last slice ends."""
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        for piece in shard.slices:
            if not piece.padding:
                ends = tuple(stop for _, stop in piece.source)
                before = shapes.get(piece.hf, (0,) * len(ends))
                shapes[piece.hf] = tuple(max(pair) for pair in zip(before, ends, strict=True))
    return shapes


def hf_shapes(arch: Qwen3Arch) -> dict[str, tuple[int, ...]]:
    """Name and shape of every Hugging Face tensor of this model, in the order of the layers."""
    return covered(shards(arch, single_layout(arch), Rank(0, 0, 0, 0)))
