"""Where the tensors of the weight table lie in a torch_dist checkpoint: keys, global shapes and offsets.

megatron-core stores each tensor of the layers under one key for all layers, whole over tensor and expert parallelism:

    embedding.word_embeddings.weight                        [vocabulary, hidden]
    decoder.layers.self_attention.linear_qkv.weight         [layers, out, in]
    decoder.layers.self_attention.linear_qkv.layer_norm_weight    [layers, hidden]    (input_layernorm.weight)
    decoder.layers.mlp.linear_fc1.weight                    [layers, [gate | up], in]
    decoder.layers.mlp.linear_fc1.layer_norm_weight         [layers, hidden]          (pre_mlp_layernorm.weight)
    decoder.layers.mlp.experts.experts.linear_fc1.weight    [layers, experts, [gate | up], in]
    decoder.final_layernorm.weight, output_layer.weight     (no output layer if it is tied)

Layers are numbered as Megatron numbers them, no-op layers included. A layer's tensor is thus the unsharded
Megatron tensor of the table with one pair of matrices per expert, and LoRA tensors follow the same rule. The number and
sizes of the files follow the layout of the training. This module tells where a rank's tensor lies in the global one.
Source: `GPTModel.sharded_state_dict` with the local specification (whose keys map renames the two norms, as MindSpeed-
LLM's Qwen3 specification does), and the strategies of megatron.core.dist_checkpointing 0.16.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence

from qwen3_npu.checkpoint.binary.dtypes import Region
from qwen3_npu.checkpoint.mapping.lora import MAGNITUDE
from qwen3_npu.checkpoint.mapping.source import Contents
from qwen3_npu.checkpoint.mapping.table import OUTPUT, Shard, ShardContext, local_experts
from qwen3_npu.distributed.layout import NOOP, Layout, Rank, plan
from qwen3_npu.model.arch import Qwen3Arch

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.*)")
# Modules whose weight is sharded over tensor parallelism: the axis, and how many stacked matrices are sharded each.
_CUT = {
    "word_embeddings": (0, 1),
    "output_layer": (0, 1),
    "linear_qkv": (0, 1),
    "linear_proj": (1, 1),
    "linear_fc1": (0, 2),
    "linear_fc2": (1, 1),
}
# The keys of norms that Transformer Engine holds in the linear after them; local specifications follow it.
FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
# Modules for which megatron-core stores an (empty) extra state.
_WITH_EXTRA_STATE = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A part of a stored tensor, as one rank saves it.

    Attributes:
        key: the stored tensor's name.
        size: its whole shape.
        region: the part; its leading dimensions (layer, expert) have size 1.
        lead: the number of leading dimensions.
        shard: the part's data.
    """

    key: str
    size: tuple[int, ...]
    region: Region
    lead: int
    shard: Shard

    @property
    def label(self) -> str:
        """The key and where the part starts, e.g. `decoder.layers.mlp.linear_fc1.weight/3.0.0`."""
        return f"{self.key}/{'.'.join(str(start) for start, _ in self.region)}"


def unstacked(layout: Layout) -> Layout:
    """The layout with a pair of matrices per expert."""
    return dataclasses.replace(layout, stacked_experts=False)


def global_layout(arch: Qwen3Arch, padded_vocab_size: int, noop_layers: Sequence[int] = ()) -> Layout:
    """The layout in which a rank's tensors equal the stored ones: one rank, one pair of matrices per expert."""
    return unstacked(plan(arch, padded_vocab_size=padded_vocab_size, noop_layers=noop_layers))


def layer_places(layout: Layout) -> dict[int, int]:
    """Number of a layer in the model -> its number when no-op layers are counted too."""
    places = [layer for virtual in range(layout.virtual) for stage in layout.chunks for layer in stage[virtual]]
    return {layer: place for place, layer in enumerate(places) if layer != NOOP}


def key_of(shard: Shard, places: dict[int, int], first_expert: int = 0) -> tuple[str, tuple[int, ...]]:
    """The stored tensor that holds a shard, and the shard's leading indices (layer, expert) in it."""
    if shard.layer is None:
        return shard.name, ()
    match = _LAYER.fullmatch(shard.name)
    assert match, shard.name
    rest, lead = match[2], (places[shard.layer],)
    if expert := _EXPERT.fullmatch(rest):
        return f"decoder.layers.mlp.experts.experts.{expert[2]}", (*lead, first_expert + int(expert[1]))
    return f"decoder.layers.{FUSED_NORMS.get(rest, rest)}", lead


def possible_keys(key: str, lead: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Where other models keep the tensor that `key_of` places: the usual key first.

    Norms may keep their own name (as in Transformer Engine's MoE layers), and layers may have keys of their own
    (megatron-core's "non-homogeneous" layers).
    """
    original = {f"decoder.layers.{renamed}": f"decoder.layers.{name}" for name, renamed in FUSED_NORMS.items()}
    for name in dict.fromkeys((key, original.get(key, key))):
        yield name, lead
        if lead:
            yield name.replace("decoder.layers.", f"decoder.layers.{lead[0]}.", 1), lead[1:]


def saved_chunks(contents: Contents, layout: Layout, rank: Rank) -> Iterator[Chunk]:
    """The chunks that one rank saves. If several ranks hold a copy, the first one in `layout.ranks()` saves it."""
    layout = unstacked(layout)
    places, counts = layer_places(layout), (layout.num_layers, contents.arch.num_experts)
    first_expert = local_experts(ShardContext(contents.arch, layout, rank))[0].start
    saves = {kind: _saves(layout, rank, *kind) for kind in itertools.product((False, True), repeat=2)}
    for shard in contents.shards(layout, rank):
        if shard.name == OUTPUT.megatron and contents.arch.tie_word_embeddings:
            continue  # a copy of the embedding, which is not stored twice
        axis, halves = _sharded_axis(shard.name)
        is_expert = ".experts." in shard.name
        parts, index = (layout.expert_tensor, rank.expert_tensor) if is_expert else (layout.tensor, rank.tensor)
        if axis is None:
            parts, index = 1, 0
        if not saves[is_expert, axis is not None]:
            continue
        key, lead = key_of(shard, places, first_expert)
        size = (*counts[: len(lead)], *(n * parts if i == axis else n for i, n in enumerate(shard.shape)))
        for half in range(halves):
            part = _rows(shard, half, halves)
            start = [(half * parts + index) * n if i == axis else 0 for i, n in enumerate(part.shape)]
            inner = ((o, o + n) for o, n in zip(start, part.shape, strict=True))
            yield Chunk(key, size, (*((i, i + 1) for i in lead), *inner), len(lead), shard=part)


def _rows(shard: Shard, half: int, halves: int) -> Shard:
    """One of the stacked matrices that make up a shard."""
    rows = shard.shape[0] // halves
    pieces = [
        dataclasses.replace(p, target=((p.target[0][0] - half * rows, p.target[0][1] - half * rows), *p.target[1:]))
        for p in shard.slices
        if p.target[0][0] // rows == half
    ]
    shape = (rows, *shard.shape[1:])
    return dataclasses.replace(shard, shape=shape, view=shape, slices=tuple(pieces))


def extra_states(contents: Contents, layout: Layout, rank: Rank) -> list[str]:
    """Names of the empty objects that megatron-core saves beside the weights of one rank, and asks for on load."""
    names = []
    for chunk in saved_chunks(contents, layout, rank):
        stem, _, leaf = chunk.key.rpartition(".")
        stem = stem.removesuffix(".base_layer")
        first = not any(start for start, _ in chunk.region[chunk.lead :])
        if leaf == "weight" and stem.endswith(_WITH_EXTRA_STATE) and first:
            place = ".".join(str(start) for start, _ in chunk.region[: chunk.lead])
            names.append(f"{stem}._extra_state/shard_{place}_{'.'.join(map(str, chunk.size[: chunk.lead]))}")
    return names


def _sharded_axis(name: str) -> tuple[int | None, int]:
    """The axis over which a tensor is sharded, and how many stacked matrices it holds."""
    module = next((part for part in name.split(".") if part in _CUT), None)
    if module is None:
        return None, 1
    axis, halves = _CUT[module]
    # A has the input side of the weight, B the output side; the other side is the rank. An embedding's input is tokens.
    if MAGNITUDE in name and axis == 1:
        return None, 1
    if module == "word_embeddings" and "lora_" in name:
        return (1, 1) if "lora_A" in name else (None, 1)
    if ("lora_A" in name and axis == 0) or ("lora_B" in name and axis == 1):
        return None, 1
    return axis, halves


def _saves(layout: Layout, rank: Rank, is_expert: bool, is_sharded: bool) -> bool:
    """Whether a rank is the first of its pipeline stage that holds the same tensor."""

    def holds(r: Rank) -> tuple:
        if is_expert:
            return r.pipeline, r.expert, r.expert_tensor if is_sharded else 0
        return r.pipeline, r.tensor if is_sharded else 0

    return rank == next(r for r in layout.ranks() if holds(r) == holds(rank))


def state_prefix(state: str) -> str:
    """Prefix of the keys of the optimizer's state; empty for weights."""
    return f"optimizer.state.{state}." if state else ""


def random_key(layout: Layout, rank: Rank) -> str:
    """The key under which a rank's states of random generators are stored."""
    ranks = list(layout.ranks())
    return f"rng_state/shard_{ranks.index(rank)}_{len(ranks)}"
