"""Flags that say which model it is. Shapes come from config.json; shape flags are assertions."""

from __future__ import annotations

import dataclasses

from qwen3_npu.cli import flag, option
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch
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

    num_layers: int | None = flag(None, unit="layers", help="transformer layers, places of --noop-layers included")
    hidden_size: int | None = flag(None, help="width of the residual stream")
    ffn_hidden_size: int | None = flag(None, help="width of the MLP (intermediate_size)")
    num_attention_heads: int | None = flag(None, unit="heads", help="query heads")
    num_query_groups: int | None = flag(None, unit="heads", help="key/value heads")
    kv_channels: int | None = flag(None, help="size of one head (head_dim)")
    rotary_base: float | None = flag(None, help="rope_theta")
    norm_epsilon: float | None = flag(None, help="rms_norm_eps")
    vocab_size: int | None = flag(None, unit="rows", help="rows of the embedding, without padding")
    untie_embeddings_and_output_weights: bool | None = flag(None, help="output layer has its own weight")
    num_experts: int | None = flag(None, help="experts of each MoE layer")
    moe_router_topk: int | None = flag(None, unit="experts", help="experts that each token uses")
    moe_ffn_hidden_size: int | None = flag(
        None, names=("--moe-intermediate-size",), help="width of one expert (moe_intermediate_size)"
    )
    norm_topk_prob: bool | None = flag(None, help="router weights of the chosen experts add up to 1")
    padded_vocab_size: int | None = flag(None, minimum=1, unit="rows", help="rows of the embedding after padding")
    make_vocab_size_divisible_by: int = flag(1, minimum=1, unit="rows", help="pad the vocabulary to this times TP")
    max_position_embeddings: int | None = flag(
        None, minimum=1, unit="tokens", help="longest sequence allowed; default: what config.json says"
    )


# Megatron's flag -> the fact of the architecture that it must agree with.
_FACTS = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "rotary_base": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "num_experts": "num_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "norm_topk_prob": "norm_topk_prob",
}


def check_shapes(shape: ShapeArgs, arch: Qwen3Arch, noop_layers: int = 0) -> None:
    """Raises: UsageError: naming every shape flag that contradicts the architecture."""
    pairs = [(name, getattr(shape, name), getattr(arch, fact)) for name, fact in _FACTS.items()]
    pairs.append(("num_layers", shape.num_layers, arch.num_hidden_layers + noop_layers))
    untied = not arch.tie_word_embeddings
    pairs.append(("untie_embeddings_and_output_weights", shape.untie_embeddings_and_output_weights, untied))
    if not arch.is_moe:
        pairs = [pair for pair in pairs if pair[0] != "norm_topk_prob"]  # a script for both kinds may carry it
    wrong = [
        f"{option(name)} {said} but the model has {fact}"
        for name, said, fact in pairs
        if said is not None and said != fact
    ]
    if wrong:
        raise UsageError("; ".join(wrong) + ": drop the flag or change the model")


def arch_from_shapes(shape: ShapeArgs, noop_layers: int = 0) -> Qwen3Arch | None:
    """The architecture if the shape flags alone describe one (a MindSpeed-LLM script), else None."""
    needed = (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size, shape.num_attention_heads)
    vocab = shape.vocab_size or shape.padded_vocab_size
    if None in needed or vocab is None:
        return None
    layers, hidden, ffn, heads = (int(n or 0) for n in needed)
    return Qwen3Arch(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers - noop_layers,
        num_attention_heads=heads,
        num_key_value_heads=shape.num_query_groups or heads,
        head_dim=shape.kv_channels or hidden // heads,
        tie_word_embeddings=not shape.untie_embeddings_and_output_weights,
        max_position_embeddings=shape.max_position_embeddings or 40960,
        rope_theta=shape.rotary_base or 1_000_000.0,
        rms_norm_eps=shape.norm_epsilon or 1e-6,
        num_experts=shape.num_experts or 0,
        num_experts_per_tok=shape.moe_router_topk or 0,
        moe_intermediate_size=shape.moe_ffn_hidden_size or 0,
        norm_topk_prob=True if shape.norm_topk_prob is None else shape.norm_topk_prob,
    )
