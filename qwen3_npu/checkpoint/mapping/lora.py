"""LoRA tensors in the style of the weight table: derived from the rows of `table.py`, so they are sharded as those are.

A LoRA of rank r adds (alpha / r) * B @ A to a weight. In a Megatron checkpoint each wrapped linear has one A, shared by
the projections that it joins, and a B whose rows are in the order of the base weight's rows. Names and shapes are
MindSpeed-LLM's (`in` and `out` are the whole sizes, L the layer's number on the rank, E the rank's experts, F its part
of an expert's FFN width, H the hidden size):

    decoder.layers.L.self_attention.linear_qkv     .base_layer.weight [out/TP, in]   the weight, under its new name
                                                   .lora_A.default.weight [r, in]    on every TP rank
                                                   .lora_B.default.weight [out/TP, r]
    decoder.layers.L.self_attention.linear_proj    .base_layer.weight [out, in/TP]
                                                   .lora_A.default.weight [r, in/TP]
                                                   .lora_B.default.weight [out, r]   on every TP rank
    each of them, with DoRA                        .lora_magnitude_vector.default.weight, [out/TP] or [out] as rows of B
    decoder.layers.L.mlp.linear_fc1                as linear_qkv; rows of B are [gate | up] of the rank
    decoder.layers.L.mlp.linear_fc2                as linear_proj
    decoder.layers.L.mlp.experts.local_experts.K.linear_fc1 / .linear_fc2    as the dense ones, sharded over ETP

    decoder.layers.L.mlp.experts.weight1           its own name is kept
                                .weight1_lora_a    [H, E r], memory (E, H, r)
                                .weight1_lora_b    [r, E 2F], memory (E, r, [gate | up])
                                .weight2_lora_a    [E F, r], memory (E, F, r)
                                .weight2_lora_b    [E r, H], memory (E, r, H)
    with PiSSA                  .weight1_lora_a_initial, .. beside each of them; of linears .lora_A.initial.weight, ..
    with DoRA                   .weight1_lora_magnitude_vector [E 2F], .weight2_lora_magnitude_vector [E H]
    Stacked experts multiply from the right: weight1 (E, H, 2F) += (alpha / r) * lora_a (E, H, r) @ lora_b (E, r, 2F).

Their slices are slices of PEFT's tensors, one pair per Hugging Face projection:

    base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight [r, in]   .lora_B.weight [out, r]
    base_model.model.model.embed_tokens.lora_embedding_A [r, vocabulary]     .lora_embedding_B [hidden, r]

so a Megatron A holds q's, k's and v's A, which are therefore equal. The head of a reward model is trained beside its
adapter and belongs to it: `score.lora_weight`, PEFT's `base_model.model.score.weight` (modules_to_save). The arguments
of a checkpoint with LoRA tensors have `lora_r`, `lora_alpha`, `lora_target_modules` and, for rsLoRA,
`use_rslora`, `lora_layers` where not every layer has a target, `use_dora`
for DoRA, and `lora_init` for PiSSA. No torch here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from qwen3_npu.args.lora import ALL_TARGETS, TargetLayers, has_target, lora_scale, spelled
from qwen3_npu.checkpoint.mapping.table import SCORE, Shard, TensorSlice, covered, shards
from qwen3_npu.distributed.layout import Layout, Rank, single_layout
from qwen3_npu.model.arch import Qwen3Arch

STACKED_TARGETS = {"weight1": "linear_fc1", "weight2": "linear_fc2"}
END_TARGETS = {"word_embeddings": "embedding", "output_layer": "output"}
_PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
LORA_SCORE, PEFT_SCORE = "score.lora_weight", _PREFIX + SCORE.hf[0]


@dataclasses.dataclass(frozen=True)
class Lora:
    """What an adapter is.

    Attributes:
        r: rank.
        alpha: the adapter is scaled by alpha / r, or alpha / sqrt(r).
        targets: names of `ALL_TARGETS`, in that order.
        is_stabilized: rsLoRA.
        layers: target -> its layers, for targets that only some layers have.
        is_dora: each row of W + scale * B @ A is scaled to the norm in the magnitude vector.
        is_residual: PiSSA. The adapter also has its initial A0 and B0. The base beside it in a checkpoint is
            W - scale * B0 @ A0, so the adapter adds scale * (B @ A - B0 @ A0) to the original weights W.
    """

    r: int
    alpha: float
    targets: tuple[str, ...]
    is_stabilized: bool = False
    layers: TargetLayers = ()
    is_dora: bool = False
    is_residual: bool = False

    def has(self, target: str | None, layer: int | None) -> bool:
        """Whether a target has an adapter, in a layer (None outside the layers)."""
        return has_target(self.targets, self.layers, target, layer)

    @property
    def scale(self) -> float:
        return lora_scale(self.alpha, self.r, is_stabilized=self.is_stabilized)

    def __str__(self) -> str:
        kind = "PiSSA " * self.is_residual + "rs" * self.is_stabilized + ("DoRA" if self.is_dora else "LoRA")
        return f"{kind} r {self.r}, alpha {self.alpha:g}, {spelled(self.targets, self.layers)}"


def initial(name: str) -> str:
    """The name of PiSSA's initial A or B, from the name of the trained one. PEFT has no such tensor."""
    return name.removesuffix(".weight") + ".initial.weight"


def peft_name(hf: str, matrix: str) -> str:
    """PEFT's name of the "A", "B" or `MAGNITUDE` beside a Hugging Face weight."""
    stem = _PREFIX + hf.removesuffix(".weight")
    if matrix == MAGNITUDE:
        return f"{stem}.{MAGNITUDE}"
    return f"{stem}.lora_embedding_{matrix}" if stem.endswith("embed_tokens") else f"{stem}.lora_{matrix}.weight"


def peft_module(name: str) -> str:
    """The module that a PEFT tensor belongs to, as peft names it in the base model."""
    return name.removeprefix(_PREFIX).rsplit(".lora_", 1)[0]


def is_a(name: str) -> bool:
    """Whether a PEFT tensor is an A [r, in], and not a B [out, r]."""
    return ".lora_A." in name or name.endswith(".lora_embedding_A")


def target_of(name: str) -> str | None:
    """Which of `ALL_TARGETS` a base weight's Megatron name belongs to, if any."""
    parts = name.split(".")
    if parts[-1] in STACKED_TARGETS:
        return STACKED_TARGETS[parts[-1]]
    module = END_TARGETS.get(parts[-2], parts[-2])
    return module if module in ALL_TARGETS else None


def base_shard(shard: Shard, lora: Lora) -> Shard:
    """A base weight with the name that it has beside an adapter."""
    if not lora.has(target_of(shard.name), shard.layer) or len(shard.view) == 3:
        return shard
    stem, _, leaf = shard.name.rpartition(".")
    return dataclasses.replace(shard, name=f"{stem}.base_layer.{leaf}")


def adapter_shards(arch: Qwen3Arch, lora: Lora, layout: Layout, rank: Rank) -> Iterator[Shard]:
    """Every LoRA tensor of one rank, in the model's order; slices are of PEFT's tensors."""
    for shard in shards(arch, layout, rank):
        if shard.name == SCORE.megatron:
            whole = [dataclasses.replace(piece, hf=PEFT_SCORE) for piece in shard.slices]
            yield dataclasses.replace(shard, name=LORA_SCORE, slices=tuple(whole))
        elif lora.has(target := target_of(shard.name), shard.layer) and len(shard.view) > 1:  # a bias has no adapter
            if target == "embedding":
                shard = _turned(shard)
            pair = tuple(_stacked(shard, lora.r) if len(shard.view) == 3 else _linear(shard, lora.r))
            yield from pair
            if lora.is_residual and target != "embedding":
                yield from map(_initial, pair)
            if lora.is_dora:
                yield _magnitudes(shard)


def _initial(shard: Shard) -> Shard:
    """PiSSA's initial A or B, for a trained one."""
    pieces = tuple(dataclasses.replace(piece, hf=initial(piece.hf)) for piece in shard.slices)
    is_stacked = len(shard.view) == 3
    name = f"{shard.name}_initial" if is_stacked else shard.name.replace(".default.", ".initial.")
    return dataclasses.replace(shard, name=name, slices=pieces)


def _magnitudes(shard: Shard) -> Shard:
    """The vector [out] beside a weight [out, in], or (experts, out) beside a stacked one (experts, in, out)."""
    is_stacked, turned = len(shard.view) == 3, "word_embeddings" in shard.name
    # Padding of a vocabulary is padding of the side that has it.
    pieces = [
        TensorSlice(
            peft_name(p.hf, MAGNITUDE),
            p.source[:1],
            (p.target[0], p.target[2]) if is_stacked else p.target[:1],
            padding=p.padding and not turned,
        )
        for p in shard.slices
    ]
    if is_stacked:
        experts, _, outer = shard.view
        name = f"{shard.name}_{MAGNITUDE}"
        return _beside(shard, name, (experts * outer,), (experts, outer), slices=pieces)
    name = f"{shard.name.removesuffix('weight')}{MAGNITUDE}.default.weight"
    return _beside(shard, name, shard.shape[:1], shard.view[:1], slices=pieces)


def _turned(shard: Shard) -> Shard:
    """The embedding [vocabulary, hidden] as the linear [out, in] of one-hot vectors that an adapter sees."""
    pieces = [dataclasses.replace(p, source=p.source[::-1], target=p.target[::-1]) for p in shard.slices]
    return dataclasses.replace(shard, shape=shard.shape[::-1], view=shard.view[::-1], slices=tuple(pieces))


def _linear(shard: Shard, r: int) -> Iterator[Shard]:
    """A [r, in] and B [out, r] of a weight [out, in]; `in` of A and `out` of B are sharded as those of the weight."""
    rows, columns = shard.view
    stem = shard.name.removesuffix("weight")
    # Padding of a vocabulary is padding of the side that has it.
    tall = "word_embeddings" not in shard.name
    a = [
        TensorSlice(peft_name(p.hf, "A"), ((0, r), p.source[1]), ((0, r), p.target[1]), padding=p.padding and not tall)
        for p in shard.slices
    ]
    b = [
        TensorSlice(peft_name(p.hf, "B"), (p.source[0], (0, r)), (p.target[0], (0, r)), padding=p.padding and tall)
        for p in shard.slices
    ]
    yield _beside(shard, f"{stem}lora_A.default.weight", (r, columns), (r, columns), slices=a)
    yield _beside(shard, f"{stem}lora_B.default.weight", (rows, r), (rows, r), slices=b)


def _stacked(shard: Shard, r: int) -> Iterator[Shard]:
    """a (experts, in, r) and b (experts, r, out) beside a weight (experts, in, out), both transposed as it is."""
    experts, inner, outer = shard.view
    a = [
        TensorSlice(peft_name(p.hf, "A"), ((0, r), p.source[1]), (p.target[0], p.target[1], (0, r)), transposed=True)
        for p in shard.slices
    ]
    b = [
        TensorSlice(peft_name(p.hf, "B"), (p.source[0], (0, r)), (p.target[0], (0, r), p.target[2]), transposed=True)
        for p in shard.slices
    ]
    first = shard.name.endswith("weight1")  # stored as (inner, rest), weight2 as (rest, outer)
    a_shape = (inner, experts * r) if first else (experts * inner, r)
    b_shape = (r, experts * outer) if first else (experts * r, outer)
    yield _beside(shard, f"{shard.name}_lora_a", a_shape, (experts, inner, r), slices=a)
    yield _beside(shard, f"{shard.name}_lora_b", b_shape, (experts, r, outer), slices=b)


def _beside(
    base: Shard, name: str, shape: tuple[int, ...], view: tuple[int, ...], *, slices: list[TensorSlice]
) -> Shard:
    # The heads of q share one A with the same slice: once is enough.
    return Shard(name, shape, view, tuple(dict.fromkeys(slices)), chunk=base.chunk, layer=base.layer)


def peft_shapes(arch: Qwen3Arch, lora: Lora) -> dict[str, tuple[int, ...]]:
    """Name and shape of every PEFT tensor of an adapter."""
    return covered(adapter_shards(arch, lora, single_layout(arch), Rank(0, 0, 0, 0)))
