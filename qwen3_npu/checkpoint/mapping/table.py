"""The weight table: every Megatron tensor of a model, and where each part of it lies in the Hugging Face tensors.

One table serves both directions. A row says which slices make up its tensor (`slices.py`). Conversion to Megatron
copies slices forward, conversion to Hugging Face copies them backward, resharding does both, and loading copies them
into the parameters of a live model. Pure arithmetic: no torch, no files, no process groups.

Names and layouts are those of MindSpeed-LLM's "local" models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

from qwen3_npu.checkpoint.mapping import slices
from qwen3_npu.checkpoint.mapping.slices import ShardContext, SliceRule, TensorSlice
from qwen3_npu.distributed.layout import NOOP, Layout, Rank, single_layout
from qwen3_npu.model.arch import Qwen3Arch


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
    where: str
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


_ATTENTION, _MLP, _EXPERT = "model.layers.{l}.self_attn.", "model.layers.{l}.mlp.", "model.layers.{l}.mlp.experts.{e}."
_GATE_UP = (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight")
_DOWN = (_EXPERT + "down_proj.weight",)
_ONE_EXPERT = "mlp.experts.local_experts.{k}."

EMBEDDING = WeightRow("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), slices.vocabulary, FIRST)
OUTPUT = WeightRow(
    "output_layer.weight", ("lm_head.weight",), slices.vocabulary, LAST, when=lambda arch, layout: not arch.reward
)
# The head of a reward model, whole on every rank of the last stage.
SCORE = WeightRow("score.weight", ("score.weight",), slices.one_row, LAST, when=lambda arch, layout: arch.reward)

TABLE: tuple[WeightRow, ...] = (
    EMBEDDING,
    WeightRow(
        "input_layernorm.weight", ("model.layers.{l}.input_layernorm.weight",), slices.replicated(_hidden), LAYER
    ),
    WeightRow(
        "self_attention.linear_qkv.weight", tuple(f"{_ATTENTION}{x}_proj.weight" for x in "qkv"), slices.qkv, LAYER
    ),
    WeightRow(
        "self_attention.linear_qkv.bias",
        tuple(f"{_ATTENTION}{x}_proj.bias" for x in "qkv"),
        slices.qkv_bias,
        LAYER,
        when=_qkv_bias,
    ),
    WeightRow(
        "self_attention.q_layernorm.weight",
        (_ATTENTION + "q_norm.weight",),
        slices.replicated(_head),
        LAYER,
        when=_qk_norm,
    ),
    WeightRow(
        "self_attention.k_layernorm.weight",
        (_ATTENTION + "k_norm.weight",),
        slices.replicated(_head),
        LAYER,
        when=_qk_norm,
    ),
    WeightRow(
        "self_attention.linear_proj.weight",
        (_ATTENTION + "o_proj.weight",),
        slices.columns(slices.attention_width),
        LAYER,
    ),
    WeightRow(
        "self_attention.linear_proj.bias",
        (_ATTENTION + "o_proj.bias",),
        slices.replicated(_hidden),
        LAYER,
        when=_o_bias,
    ),
    WeightRow(
        "pre_mlp_layernorm.weight",
        ("model.layers.{l}.post_attention_layernorm.weight",),
        slices.replicated(_hidden),
        LAYER,
    ),
    WeightRow(
        "mlp.linear_fc1.weight",
        (_MLP + "gate_proj.weight", _MLP + "up_proj.weight"),
        slices.gate_up,
        LAYER,
        when=_dense,
    ),
    WeightRow(
        "mlp.linear_fc2.weight", (_MLP + "down_proj.weight",), slices.columns(slices.ffn_width), LAYER, when=_dense
    ),
    WeightRow("mlp.router.weight", (_MLP + "gate.weight",), slices.router, LAYER, when=_moe),
    WeightRow("mlp.experts.weight1", _GATE_UP, slices.experts_fc1, LAYER, when=_stacked),
    WeightRow("mlp.experts.weight2", _DOWN, slices.experts_fc2, LAYER, when=_stacked),
    WeightRow(_ONE_EXPERT + "linear_fc1.weight", _GATE_UP, slices.expert_gate_up, LAYER, when=_single_experts),
    WeightRow(_ONE_EXPERT + "linear_fc2.weight", _DOWN, slices.expert_down, LAYER, when=_single_experts),
    WeightRow("decoder.final_layernorm.weight", ("model.norm.weight",), slices.replicated(_hidden), LAST),
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
        experts = enumerate(slices.local_experts(at)[0]) if "{k}" in row.megatron else [(0, "{e}")]
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
