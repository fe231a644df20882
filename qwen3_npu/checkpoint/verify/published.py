"""Which parts of the Hugging Face tensors each Megatron tensor holds: --verify's own description of published layouts.

The weight table (`checkpoint/mapping`) is not used here, so a mistake there shows as a difference. A Megatron tensor is
described before it is sharded, as a matrix made of strips: rows of Hugging Face matrices (a vector is a matrix of one
column). A rank holds some of its rows and columns.

Sources: transformers' modeling_qwen3.py and modeling_qwen3_moe.py for names and shapes; megatron-core's
`SelfAttention.get_query_key_value_tensors` (per group its query heads, a key head, a value head), `GPTModel`,
`GroupedMLP` (experts multiply from the right) and `parallel_state` (order of ranks and of virtual stages);
MindSpeed-LLM's names of LoRA tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from qwen3_npu.checkpoint.mapping.lora import Lora
from qwen3_npu.checkpoint.mapping.source import Contents
from qwen3_npu.model.arch import Qwen3Arch

Span = tuple[int, int]
ROWS, HALVES, COLUMNS, WHOLE = "rows", "each half of the rows", "columns", "not sharded"


class Strip(NamedTuple):
    """`rows` rows of a Hugging Face matrix from row `first` on, which are the rows of a Megatron matrix from `at` on.

    `copy`: another strip holds the same rows; they are read from there. Padding of the vocabulary repeats row `first`.
    """

    hf: str
    at: int
    rows: int
    first: int = 0
    copy: str = ""


PADDING, TIED = "padding", "tied"
DORA = "lora_magnitude_vector"


class WholeMatrix(NamedTuple):
    """A Megatron tensor before it is sharded; `name` is that inside its layer, or in the model."""

    name: str
    rows: int
    columns: int
    strips: tuple[Strip, ...]
    sharded: str = WHOLE
    is_vector: bool = False
    is_turned: bool = False  # its transpose is stored


def peft_tensor(module: str, matrix: str) -> str:
    """PEFT's name of the "A", "B" or `DORA` beside a module; those of an embedding are parameters, not modules."""
    stem = f"base_model.model.{module}."
    if matrix == DORA:
        return stem + DORA
    return f"{stem}lora_embedding_{matrix}" if module.endswith("embed_tokens") else f"{stem}lora_{matrix}.weight"


def is_turned(name: str) -> bool:
    """Whether a PEFT tensor is read as its transpose: the A of an embedding, which has a column for each token."""
    return name.endswith("lora_embedding_A")


def _has(lora: Lora | None, target: str, layer: int | None) -> bool:
    """Whether an adapter is on a target (in a layer)."""
    if lora is None or target not in lora.targets:
        return False
    return layer is None or all(layer in layers for of, layers in lora.layers if of == target)


def _linears(arch: Qwen3Arch, layer: int, experts: Iterable[int]) -> Iterator[tuple[str, list[Strip], int, str]]:
    """(Megatron's module, strips of the modules it joins, columns, how it is sharded) of each linear of a layer."""
    at, hidden, size = f"model.layers.{layer}.", arch.hidden_size, arch.head_dim
    queries, groups = arch.num_attention_heads, arch.num_key_value_heads
    shared = queries // groups
    heads = []
    for slot in range(queries + 2 * groups):
        group, place = divmod(slot, shared + 2)
        letter, head = ("q", group * shared + place) if place < shared else ("kv"[place - shared], group)
        heads.append(Strip(f"{at}self_attn.{letter}_proj", slot * size, size, head * size))
    yield "self_attention.linear_qkv", heads, hidden, ROWS
    yield "self_attention.linear_proj", [Strip(f"{at}self_attn.o_proj", 0, hidden)], queries * size, COLUMNS
    mlps = [("mlp.", f"{at}mlp.", arch.intermediate_size)]
    if arch.is_moe:
        width = arch.moe_intermediate_size
        mlps = [(f"mlp.experts.local_experts.{e}.", f"{at}mlp.experts.{e}.", width) for e in experts]
    for name, hf, width in mlps:
        yield (
            f"{name}linear_fc1",
            [Strip(f"{hf}gate_proj", 0, width), Strip(f"{hf}up_proj", width, width)],
            hidden,
            HALVES,
        )
        yield f"{name}linear_fc2", [Strip(f"{hf}down_proj", 0, hidden)], width, COLUMNS


def _own_names(arch: Qwen3Arch, matrices: Iterable[WholeMatrix]) -> Iterator[WholeMatrix]:
    """With the family's names of Hugging Face tensors."""
    for m in matrices:
        yield m._replace(strips=tuple(s._replace(hf=arch.family.hf_name(s.hf)) for s in m.strips))


def layer_matrices(contents: Contents, layer: int, experts: Iterable[int], *, stacked: bool) -> Iterator[WholeMatrix]:
    """Every tensor of a layer, experts under their numbers in the model."""
    return _own_names(contents.arch, _layer(contents, layer, experts, stacked=stacked))


def _layer(contents: Contents, layer: int, experts: Iterable[int], *, stacked: bool) -> Iterator[WholeMatrix]:
    arch, lora = contents.arch, contents.lora
    biased = {"self_attention.linear_qkv": arch.family.qkv_bias, "self_attention.linear_proj": arch.family.o_bias}
    for name, strips, columns, sharded in _linears(arch, layer, experts):
        rows = strips[-1].at + strips[-1].rows
        adapted = _has(lora, name.rpartition(".")[2], layer)
        stem = f"{name}.base_layer" if adapted and not (stacked and "local_experts" in name) else name
        if contents.base:
            named = tuple(s._replace(hf=f"{s.hf}.weight") for s in strips)
            yield WholeMatrix(f"{stem}.weight", rows, columns, named, sharded=sharded)
        if contents.base and biased.get(name):
            named = tuple(s._replace(hf=f"{s.hf}.bias") for s in strips)
            yield WholeMatrix(
                f"{stem}.bias", rows, 1, named, sharded=WHOLE if sharded == COLUMNS else sharded, is_vector=True
            )
        if adapted and lora is not None:
            # All that are joined share one A; B has the rows of the weight.
            a = tuple(Strip(peft_tensor(hf, "A"), 0, lora.r) for hf in dict.fromkeys(s.hf for s in strips))
            b = tuple(s._replace(hf=peft_tensor(s.hf, "B")) for s in strips)
            ours = (sharded, WHOLE) if sharded == COLUMNS else (WHOLE, sharded)
            pair = [
                WholeMatrix(f"{name}.lora_A.default.weight", lora.r, columns, a, sharded=ours[0]),
                WholeMatrix(f"{name}.lora_B.default.weight", rows, lora.r, b, sharded=ours[1]),
            ]
            yield from pair
            if lora.is_residual:
                yield from map(_begun, pair)
            if lora.is_dora:
                m = tuple(s._replace(hf=peft_tensor(s.hf, DORA)) for s in strips)
                yield WholeMatrix(f"{name}.{DORA}.default.weight", rows, 1, m, sharded=ours[1], is_vector=True)
    if contents.base:
        yield from _others(arch, layer)


def _begun(matrix: WholeMatrix) -> WholeMatrix:
    """PiSSA's initial A or B, for a trained one."""
    strips = tuple(s._replace(hf=s.hf.replace(".weight", ".initial.weight")) for s in matrix.strips)
    return matrix._replace(name=matrix.name.replace(".default.", ".initial."), strips=strips)


def _others(arch: Qwen3Arch, layer: int) -> Iterator[WholeMatrix]:
    at, hidden = f"model.layers.{layer}.", arch.hidden_size
    vectors = {
        "input_layernorm.weight": (f"{at}input_layernorm.weight", hidden),
        "pre_mlp_layernorm.weight": (f"{at}post_attention_layernorm.weight", hidden),
    }
    if arch.family.qk_norm:
        for letter in "qk":
            name = f"self_attention.{letter}_layernorm.weight"
            vectors[name] = (f"{at}self_attn.{letter}_norm.weight", arch.head_dim)
    for name, (hf, size) in vectors.items():
        yield WholeMatrix(name, size, 1, (Strip(hf, 0, size),), is_vector=True)
    if arch.is_moe:
        router = Strip(f"{at}mlp.gate.weight", 0, arch.num_experts)
        yield WholeMatrix("mlp.router.weight", arch.num_experts, hidden, (router,))


def _vocabulary(
    contents: Contents, name: str, module: str, padded: int, *, target: str, copy: str = ""
) -> Iterator[WholeMatrix]:
    """Embedding or output layer, and its adapter. Rows past the vocabulary repeat its last row, as in MindSpeed-LLM
    2.1.0.
    """
    arch, lora = contents.arch, contents.lora
    adapted = lora if _has(lora, target, None) else None
    real, hidden = arch.vocab_size, arch.hidden_size

    def tall(hf: str) -> tuple[Strip, Strip]:
        return Strip(hf, 0, real, copy=copy), Strip(hf, real, padded - real, real - 1, copy=PADDING)

    if contents.base:
        stem = f"{name}.base_layer" if adapted else name
        yield WholeMatrix(f"{stem}.weight", padded, hidden, tall(f"{module}.weight"), sharded=ROWS)
    if adapted:
        a, b = (peft_tensor(module, matrix) for matrix in "AB")
        at, r = f"{name}.lora_{{}}.default.weight", adapted.r
        if target == "embedding":
            yield WholeMatrix(at.format("A"), padded, r, tall(a), sharded=ROWS, is_turned=True)
            yield WholeMatrix(at.format("B"), hidden, r, (Strip(b, 0, hidden),))
            if adapted.is_dora:
                strip = Strip(peft_tensor(module, DORA), 0, hidden)
                yield WholeMatrix(f"{name}.{DORA}.default.weight", hidden, 1, (strip,), is_vector=True)
        else:
            pair = [
                WholeMatrix(at.format("A"), r, hidden, (Strip(a, 0, r),)),
                WholeMatrix(at.format("B"), padded, r, tall(b), sharded=ROWS),
            ]
            yield from pair
            if adapted.is_residual:
                yield from map(_begun, pair)
            if adapted.is_dora:
                m = tall(peft_tensor(module, DORA))
                yield WholeMatrix(f"{name}.{DORA}.default.weight", padded, 1, m, sharded=ROWS, is_vector=True)


def outer_matrices(contents: Contents, padded: int, *, first: bool, last: bool, copies: bool) -> Iterator[WholeMatrix]:
    """The tensors outside the layers: of the first stage, of the last one, or both.

    Args:
        copies: the last stage has a copy of the embedding as its tied output layer.
    """
    return _own_names(contents.arch, _outer(contents, padded, first=first, last=last, copies=copies))


def _outer(contents: Contents, padded: int, *, first: bool, last: bool, copies: bool) -> Iterator[WholeMatrix]:
    arch = contents.arch
    embedding, hidden = "model.embed_tokens", arch.hidden_size
    if first:
        yield from _vocabulary(contents, "embedding.word_embeddings", embedding, padded, target="embedding")
    if not last:
        return
    if contents.base:
        norm = (Strip("model.norm.weight", 0, hidden),)
        yield WholeMatrix("decoder.final_layernorm.weight", hidden, 1, norm, is_vector=True)
    if arch.reward and contents.lora:
        yield WholeMatrix("score.lora_weight", 1, hidden, (Strip("base_model.model.score.weight", 0, 1),))
    elif arch.reward:
        yield WholeMatrix("score.weight", 1, hidden, (Strip("score.weight", 0, 1),))
    elif not arch.tie_word_embeddings:
        yield from _vocabulary(contents, "output_layer", "lm_head", padded, target="output")
    elif contents.base and copies:
        yield from _vocabulary(contents, "output_layer", embedding, padded, target="output", copy=TIED)


def published_shapes(contents: Contents) -> dict[str, tuple[int, ...]]:
    """Name and shape of every Hugging Face and PEFT tensor."""
    arch = contents.arch
    matrices = list(outer_matrices(contents, arch.vocab_size, first=True, last=True, copies=False))
    for layer in range(arch.num_hidden_layers):
        matrices += layer_matrices(contents, layer, range(arch.num_experts), stacked=False)
    found: dict[str, tuple[int, ...]] = {}
    for matrix in matrices:
        for strip in matrix.strips:
            if not strip.copy:
                rows = max(found.get(strip.hf, (0, 0))[-1 if matrix.is_turned else 0], strip.first + strip.rows)
                shape = (matrix.columns, rows) if matrix.is_turned else (rows, matrix.columns)
                found[strip.hf] = (rows,) if matrix.is_vector else shape
    return found
