"""Check the arguments of a checkpoint: refuse any that may mean a network that is not computed here. No torch.

A checkpoint of Megatron-LM or MindSpeed-LLM holds hundreds of arguments. An argument that is not off, zero or empty

1. is translated (`facts.py`, `megatron.py`), or
2. has its only value in `_ONLY`, or
3. is known by name not to change what a trained network computes (`harmless_arguments.py`), or
4. is refused by name, since it may mean another network.

So an unknown argument of a later version is refused if it is on; --ignore-args converts without it. An argument that is
off is not checked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping

from qwen3_npu.errors import UsageError, printable
from qwen3_npu.model.arch.facts import FACTS
from qwen3_npu.model.arch.harmless_arguments import is_harmless
from qwen3_npu.schema import shown

# Argument -> the only values that are computed here.
_ONLY: dict[str, tuple[object, ...]] = {
    "position_embedding_type": ("rope", "yarn"),
    "rotary_percent": (1.0,),
    "rope_type": ("rope", "default"),
    "partial_rotary_factor": (1.0,),
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "activation_func": ("silu",),
    "hidden_act": ("silu",),
    "moe_model_type": ("megatron_moe",),
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_scaling_factor": (1.0,),
    "routed_scaling_factor": (1.0,),
    "moe_router_num_groups": (1,),
    "moe_router_group_topk": (1,),
    "n_group": (1,),
    "topk_group": (1,),
    "decoder_sparse_step": (1,),
    "first_k_dense_replace": (-1,),
    "cla_share_factor": (1,),
    "softmax_type": ("vanilla",),
    "scale_emb": (1.0,),
    "embedding_multiplier_scale": (1.0,),
    "output_multiplier_scale": (1.0,),
    "mup_embedding_mult": (1.0,),
    "mup_attn_scale_power": (1.0,),
    "mup_width_mult": (1.0,),
    "dynamic_factor": (1.0,),
    "qkv_type": ("unpack",),
    "gated_linear_unit": (True,),
    "full_attention_interval": (1,),
    "mup_output_mult": (1.0,),
    "dim_model_base": (0,),
    "moe_router_force_load_balancing": (False,),
    "moe_router_load_balancing_bias": (False,),
    "parallel_attention": (False,),
    "parallel_residual": (False,),
    "use_parallel_residual": (False,),
    "parallel_output_layernorm": (False,),
}
# These change what is computed when they are off.
_NEVER_OFF = ("swiglu", "rotary_percent")
_MEGATRON_TRANSLATED = """
    num_layers noop_layers num_layer_list qk_layernorm add_qkv_bias add_dense_bias hf_model_type group_query_attention
    use_rope_scaling rope_scaling_type rope_scaling_factor rotary_seq_len_interpolation_factor rotary_scaling_factor
    beta_fast beta_slow low_freq_factor high_freq_factor mscale mscale_all_dim original_max_position_embeddings
    eos_token_id moe_router_pre_softmax moe_grouped_gemm tie_word_embeddings num_hidden_layers
    use_rslora own_dtypes max_window_layers sliding_window layer_types window_size moe_layer_freq softmax_scale
    moe_router_load_balancing_type rope_scaling rope_parameters reward_model
    yarn_rotary_scaling_factor yarn_correction_range_round_to_int yarn_attention_factor
""".split()  # noqa: SIM905
_MEGATRON_TRANSLATED += [
    f"{prefix}_{name}"
    for prefix in ("yarn", "rope_scaling")
    for name in ("original_max_position_embeddings", "mscale", "mscale_all_dim", "beta_fast", "beta_slow")
]
_TRANSLATED = {name for fact in FACTS for name in fact.megatron} | set(_MEGATRON_TRANSLATED)


def refuse_others(said: Mapping[str, object], where: str, own: Collection[str] = ()) -> None:
    """Check every argument that is not None; see the top of this file.

    Args:
        own: names of this project's flags, which its checkpoints hold.

    Raises:
        UsageError: some arguments mean, or may mean, an architecture that is not computed here.
    """
    unknown = []
    for name, value in said.items():
        if expected := _other(name, value, said):
            raise UsageError(f"{where}: {printable(name)} {shown(value)} {expected}")
        known = name in _ONLY or name in _WHOLE or name in _TRANSLATED or name in own
        if not known and not _is_off(value) and not is_harmless(name):
            unknown.append(name)
    if unknown:
        named = ", ".join(f"{printable(name)} {shown(said[name])}" for name in unknown[:8]) + " .." * (len(unknown) > 8)
        are = "is another architecture or not" if len(unknown) == 1 else "are other architectures or not"
        ignored = " ".join(map(printable, unknown[:64])) + " .." * (len(unknown) > 64)
        raise UsageError(
            f"{where}: {named} {are} known here; what changes nothing that the network computes is left out by "
            f"convert_ckpt.py --ignore-args {ignored}"
        )


def unlike(where: str, name: str, value: object, allowed: str) -> UsageError:
    """The text for an argument's value that means another architecture."""
    return UsageError(f"{where}: {name} {shown(value)} {_only(allowed)}")


def _only(allowed: str) -> str:
    return f"is another architecture; only {allowed} is computed here"


def _other(name: str, value: object, said: Mapping[str, object]) -> str | None:
    """The problem of one argument, or None."""
    if name in _ONLY:
        off = name not in _NEVER_OFF and not isinstance(value, str) and _is_off(value)
        return None if off or value in _ONLY[name] else _only(shown(_ONLY[name][0]))
    if name in _WHOLE:
        return None if _is_off(value) or _WHOLE[name](value, said) else _only(_WHOLE_WORDS[name])
    return None


def _is_off(value: object) -> bool:
    """Whether a value means that a feature is off."""
    return value is None or value is False or value in (0, "", "none", "None", "disable") or value in ([], (), {})


def _every_layer(value: object, said: Mapping[str, object]) -> bool:
    if isinstance(value, str):
        return bool(re.fullmatch(r"\(?\[1\](\*\d+)?\)?", value))
    return value in (1, -1) or (isinstance(value, (list, tuple)) and set(map(str, value)) == {"1"})


def _usual_scale(value: object, said: Mapping[str, object]) -> bool:
    width = said.get("kv_channels") or said.get("head_dim")
    if not isinstance(value, (int, float)) or not isinstance(width, int):
        return False
    return math.isclose(value, width**-0.5, rel_tol=1e-6)


# Arguments judged by more than a list of values: name -> whether a value is computed here.
_WHOLE: dict[str, Callable[[object, Mapping[str, object]], bool]] = {
    "window_size": lambda value, said: (
        tuple(value) in ((-1, -1), (-1, 0)) if isinstance(value, (list, tuple)) else False
    ),
    # Hugging Face's key: it has an effect only with use_sliding_window.
    "sliding_window": lambda value, said: said.get("use_sliding_window") is False,
    "layer_types": lambda value, said: isinstance(value, (list, tuple)) and set(map(str, value)) == {"full_attention"},
    "moe_layer_freq": _every_layer,
    "softmax_scale": _usual_scale,
    "moe_router_load_balancing_type": lambda value, said: "sinkhorn" not in str(value),
}
_WHOLE_WORDS = {
    "window_size": "the whole sequence",
    "sliding_window": "the whole sequence",
    "layer_types": "full_attention",
    "moe_layer_freq": "1",
    "softmax_scale": "1 / sqrt(kv_channels)",
    "moe_router_load_balancing_type": "top-k of softmax",
}
