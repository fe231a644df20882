"""Flags that say which model it is. Shapes come from config.json; shape flags are assertions."""

from __future__ import annotations

import dataclasses

from qwen3_npu.cli import flag, option
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.model.arch.facts import FACTS
from qwen3_npu.model.arch.megatron import FEATURES, from_megatron, scaling_from_megatron, unlike_family
from qwen3_npu.model.arch.rope import LLAMA3, YARN, RopeScaling
from qwen3_npu.model.sizes import SIZES


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """which model"""

    hf_dir: str | None = flag(
        None,
        metavar="DIR",
        help="Hugging Face directory whose config.json is the architecture; default: found in --load",
    )
    model: str | None = flag(None, choices=list(SIZES), help="a published size, instead of --hf-dir")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeArgs:
    """shapes (assertions: a value that contradicts the model is an error)"""

    num_layers: int | None = flag(None, minimum=1, unit="layers", help="transformer layers, no-op layers included")
    hidden_size: int | None = flag(None, minimum=1, help="width of the residual stream")
    ffn_hidden_size: int | None = flag(None, minimum=1, help="width of the MLP (intermediate_size)")
    num_attention_heads: int | None = flag(None, minimum=1, unit="heads", help="query heads")
    num_query_groups: int | None = flag(None, minimum=1, unit="heads", help="key/value heads")
    kv_channels: int | None = flag(None, minimum=1, help="size of one head (head_dim)")
    rotary_base: float | None = flag(None, above=0, help="rope_theta")
    norm_epsilon: float | None = flag(None, above=0, help="rms_norm_eps")
    vocab_size: int | None = flag(None, minimum=1, unit="rows", help="rows of the embedding, without padding")
    untie_embeddings_and_output_weights: bool | None = flag(None, help="output layer has its own weight")
    num_experts: int | None = flag(None, minimum=1, help="experts of each MoE layer")
    moe_router_topk: int | None = flag(None, minimum=1, unit="experts", help="experts that each token uses")
    moe_ffn_hidden_size: int | None = flag(
        None, minimum=1, names=("--moe-intermediate-size",), help="width of one expert (moe_intermediate_size)"
    )
    norm_topk_prob: bool | None = flag(None, help="the router weights of the chosen experts sum to 1")
    padded_vocab_size: int | None = flag(None, minimum=1, unit="rows", help="rows of the embedding after padding")
    make_vocab_size_divisible_by: int = flag(1, minimum=1, unit="rows", help="pad the vocabulary to this times TP")
    max_position_embeddings: int | None = flag(
        None,
        minimum=1,
        unit="tokens",
        help="longest sequence allowed; default: that of config.json. A larger value is stored in checkpoints",
    )
    qk_layernorm: bool | None = flag(None, help="each query and key head is normalised (Qwen3)")
    add_qkv_bias: bool | None = flag(None, help="q, k and v have a bias (Qwen2.5)")
    add_dense_bias: bool | None = flag(None, help="the attention's output has a bias")
    position_embedding_type: str | None = flag(
        None, choices=["rope", "yarn"], help="rotary embedding; yarn: as --rope-scaling-type yarn"
    )
    rope_scaling_type: str | None = flag(
        None, choices=[YARN, LLAMA3], help="stretch rotary embedding over longer sequences; it is stored in checkpoints"
    )
    rope_scaling_factor: float | None = flag(
        None,
        names=("--yarn-rotary-scaling-factor", "--yarn-scaling-factor"),
        minimum=1,
        help="factor by which sequences may be longer",
    )
    rope_scaling_original_max_position_embeddings: int | None = flag(
        None,
        names=("--yarn-original-max-position-embeddings",),
        minimum=1,
        unit="tokens",
        help="yarn: longest sequence that the model was trained with before (Qwen3: 32768)",
    )
    beta_fast: float | None = flag(
        None,
        names=("--rope-scaling-beta-fast", "--yarn-beta-fast"),
        above=0,
        help="yarn: dimensions with more turns do not change [turns; 32]",
    )
    beta_slow: float | None = flag(
        None,
        names=("--rope-scaling-beta-slow", "--yarn-beta-slow"),
        above=0,
        help="yarn: dimensions with fewer turns are divided by the factor [turns; 1]",
    )
    rope_scaling_mscale: float | None = flag(
        None, names=("--yarn-mscale",), minimum=0, help="yarn: weight in the multiplier of cos and sin [1]"
    )
    rope_scaling_mscale_all_dim: float | None = flag(
        None, names=("--yarn-mscale-all-dim",), minimum=0, help="yarn: weight in its divisor [0]"
    )
    yarn_correction_range_round_to_int: bool | None = flag(
        None, help="yarn: the dimensions between beta_fast and beta_slow begin and end at whole numbers [on]"
    )
    original_max_position_embeddings: int | None = flag(
        None, minimum=1, unit="tokens", help="llama3: longest sequence that the model was trained with before"
    )
    low_freq_factor: float | None = flag(
        None, above=0, help="llama3: dimensions with longer wavelengths are divided by the factor"
    )
    high_freq_factor: float | None = flag(
        None, above=0, help="llama3: dimensions with shorter wavelengths do not change"
    )
    use_rope_scaling: bool | None = flag(None, help="as Megatron: llama3 over 8192 positions with factors 1 and 4")
    rotary_seq_len_interpolation_factor: float | None = flag(
        None, minimum=1, help="linear: positions are divided by this factor"
    )


_ROUNDED = "yarn_correction_range_round_to_int"
# Kind of --rope-scaling-type -> its flags: those it needs, those it may have.
_ROPE_FLAGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    YARN: (
        ("rope_scaling_factor", "rope_scaling_original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "rope_scaling_mscale", "rope_scaling_mscale_all_dim", _ROUNDED),
    ),
    LLAMA3: (("rope_scaling_factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
    "use_rope_scaling": ((), ("rope_scaling_factor",)),
}


def shaped(shape: ShapeArgs, arch: Qwen3Arch, noop_layers: int = 0) -> Qwen3Arch:
    """The architecture with the changes that flags make: more positions, another rotary embedding.

    Raises:
        UsageError: naming every shape flag that contradicts the architecture.
    """
    _check_shapes(shape, arch, noop_layers)
    scaling = _scaling(shape, arch.rope_theta)
    if scaling is not None and arch.rope_scaling not in (None, scaling):
        raise UsageError(f"the flags say {scaling} but the model has {arch.rope_scaling}: drop the flags")
    scaling = scaling or arch.rope_scaling
    positions = max(arch.max_position_embeddings, shape.max_position_embeddings or 0)
    if scaling != arch.rope_scaling and scaling is not None and not shape.max_position_embeddings:
        positions = max(positions, int(scaling.original * scaling.factor))
    return dataclasses.replace(arch, rope_scaling=scaling, max_position_embeddings=positions)


def positions_note(arch: Qwen3Arch, before: Qwen3Arch) -> list[str]:
    """A line about positions beyond the model's own; None if the flags add none."""
    how = str(arch.rope_scaling) if arch.rope_scaling else "plain RoPE, as trained"
    if arch.max_position_embeddings > before.max_position_embeddings:
        if arch.rope_scaling is None:
            how = (
                f"plain RoPE stretched beyond the {before.max_position_embeddings} of the model: the "
                "model was not trained on such "
                f"distances; --rope-scaling-type yarn is the alternative"
            )
    elif arch.rope_scaling is None:
        return []
    return [f"positions: up to {arch.max_position_embeddings}, {how}"]


def _check_shapes(shape: ShapeArgs, arch: Qwen3Arch, noop_layers: int) -> None:
    pairs = [
        (fact.megatron[0], getattr(shape, fact.megatron[0], None), fact.turned(getattr(arch, fact.name)))
        for fact in FACTS
        # A script for both kinds may carry norm_topk_prob.
        if fact.megatron and fact.name != "max_position_embeddings" and (arch.is_moe or fact.name != "norm_topk_prob")
    ]
    pairs.append(("num_layers", shape.num_layers, arch.num_hidden_layers + noop_layers))
    wrong = [
        f"{option(name)} {said} but the model has {fact}"
        for name, said, fact in pairs
        if said is not None and said != fact
    ]
    features = (unlike_family(argument, getattr(shape, argument), arch.family) for argument in FEATURES.values())
    wrong += [text for text in features if text]
    if wrong:
        raise UsageError("; ".join(wrong) + ": drop the flag or change the model")


def _scaling(shape: ShapeArgs, theta: float) -> RopeScaling | None:
    """The rotary embedding that the flags describe; None without such flags."""
    said = {name: value for name, value in vars(shape).items() if value is not None}
    if said.get("position_embedding_type") == YARN:
        said["rope_scaling_type"] = YARN
    kind = said.get("rope_scaling_type") or ("use_rope_scaling" if said.get("use_rope_scaling") else None)
    needed, possible = _ROPE_FLAGS[kind] if kind else ((), ())
    switch = "--use-rope-scaling" if kind == "use_rope_scaling" else f"--rope-scaling-type {kind}"
    if missing := [option(name) for name in needed if name not in said]:
        raise UsageError(f"{switch} needs {' and '.join(missing)}")
    every = {name for flags in _ROPE_FLAGS.values() for group in flags for name in group}
    if idle := [option(name) for name in said if name in every - {*needed, *possible}]:
        wanted = " or ".join(name for name in (YARN, LLAMA3) if _attr(idle[0]) in sum(_ROPE_FLAGS[name], ()))
        with_this = f"with {switch}" if kind else "alone"
        raise UsageError(f"{idle[0]} has no effect {with_this}; it belongs to --rope-scaling-type {wanted}")
    return scaling_from_megatron(said, theta, "the flags")


def _attr(flag_name: str) -> str:
    return flag_name.removeprefix("--").replace("-", "_")


def arch_from_shapes(shape: ShapeArgs, noop_layers: int = 0) -> Qwen3Arch | None:
    """The architecture if the shape flags alone describe one (a MindSpeed-LLM script), else None."""
    needed = (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size, shape.num_attention_heads)
    if None in needed or (shape.vocab_size or shape.padded_vocab_size) is None:
        return None
    names = {"num_layers", *FEATURES.values(), *(name for fact in FACTS for name in fact.megatron)}
    said = {name: value for name, value in vars(shape).items() if name in names and value is not None}
    return from_megatron({**said, "num_layers": said["num_layers"] - noop_layers}, "the shape flags")
