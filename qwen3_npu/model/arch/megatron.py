"""Megatron's and MindSpeed-LLM's arguments <-> the architecture. No torch.

The `args` of a checkpoint and the command line use the same names. An argument for something that is not computed here
is refused by name, since weights do not show which rotary embedding, norm or activation they need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import rope
from qwen3_npu.model.arch.architecture import Qwen3Arch
from qwen3_npu.model.arch.facts import FACTS
from qwen3_npu.model.arch.families import FAMILIES
from qwen3_npu.model.arch.families.family import Family
from qwen3_npu.model.arch.hf_config import ending_tokens
from qwen3_npu.model.arch.rope import LINEAR, LLAMA3, YARN, RopeScaling
from qwen3_npu.model.arch.saved_arguments import refuse_others, unlike
from qwen3_npu.numbers import number_list
from qwen3_npu.schema import boolean, integer, number, record, shown, text

# Field of a `Family` -> the argument of the same meaning.
FEATURES = {"qk_norm": "qk_layernorm", "qkv_bias": "add_qkv_bias", "o_bias": "add_dense_bias"}
_WORDS = {
    "qk_layernorm": "norm of query and key heads",
    "add_qkv_bias": "bias in q, k and v",
    "add_dense_bias": "bias in the attention's output",
}
# Keys of config.json that may be copied into the arguments.
_HF_ROPE = ("rope_scaling", "rope_parameters")
# Arguments with one value for every family; they are written into checkpoints.
ALWAYS: dict[str, object] = {
    "group_query_attention": True,
    "add_position_embedding": True,
    "use_rotary_position_embeddings": True,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
}


def to_megatron(arch: Qwen3Arch) -> dict[str, object]:
    """The arguments of an architecture, without the number of layers, which depends on the layout (no-op layers)."""
    found = {
        fact.megatron[0]: fact.turned(getattr(arch, fact.name)) for fact in FACTS if fact.megatron and arch.has(fact)
    }
    # MindSpeed-LLM's converter back to Hugging Face takes the heads from the second name, which trainings do not set.
    found["num_key_value_heads"] = arch.num_key_value_heads
    found |= ALWAYS | {argument: getattr(arch.family, feature) for feature, argument in FEATURES.items()}
    ending = list(arch.eos_token_ids) if arch.more_eos_token_ids else arch.eos_token_id
    found |= {"hf_model_type": arch.model_type, "eos_token_id": ending}
    if arch.reward:
        found["reward_model"] = True
    return found | (_scaling_arguments(arch.rope_scaling) if arch.rope_scaling else {})


def from_megatron(args: Mapping[str, object], where: str, own: Collection[str] = ()) -> Qwen3Arch:
    """The architecture that arguments describe (Megatron's or MindSpeed-LLM's own).

    Args:
        own: names of this project's flags that a checkpoint holds, too.

    Raises:
        UsageError: a fact is missing or has another type, or the architecture is not computed here.
    """
    said = _said(args, where)
    refuse_others(said, where, own)
    if said.get("group_query_attention") is False and said.get("num_query_groups") == 1:
        said.pop("num_query_groups")  # Megatron's default, which it does not use without --group-query-attention
    family = _family(said, where)
    facts: dict[str, Any] = {"model_type": family.model_type}
    for fact in FACTS:
        if not fact.megatron or (fact.moe and not family.moe):
            continue
        name = next((name for name in fact.megatron if name in said), None)
        if name is not None:
            facts[fact.name] = fact.read(fact.turned(said[name]), f"{where}: {name}")
        elif fact.args_default is not None:
            facts[fact.name] = fact.turned(fact.args_default)
        elif fact.name not in ("num_key_value_heads", "head_dim", "bos_token_id"):
            raise UsageError(f"{where}: its args have no {fact.megatron[0]}; give the architecture with --hf-cfg-dir")
    facts.setdefault("num_key_value_heads", facts["num_attention_heads"])
    facts.setdefault("head_dim", facts["hidden_size"] // facts["num_attention_heads"])
    layers = _needed(said, "num_layers", where)
    facts["num_hidden_layers"] = layers - len(number_list(said.get("noop_layers")))
    if "norm_topk_prob" not in said and said.get("moe_router_pre_softmax"):
        facts["norm_topk_prob"] = False  # softmax over all experts, and the chosen weights are not normalised
    if not family.moe or "norm_topk_prob" not in facts:
        facts.pop("norm_topk_prob", None)
    if "bos_token_id" in args:
        facts.setdefault("bos_token_id", None)
    if "eos_token_id" in args:  # a copy of config.json's value, which may be a list
        ending = ending_tokens(args["eos_token_id"], where)
        facts["eos_token_id"], facts["more_eos_token_ids"] = next(iter(ending), None), tuple(ending[1:])
    facts["rope_scaling"] = scaling_from_megatron(said, facts["rope_theta"], where)
    return Qwen3Arch(**facts, reward=boolean(said.get("reward_model", False), f"{where}: reward_model"))


def check_trained(args: Mapping[str, object], arch: Qwen3Arch, where: str, own: Collection[str] = ()) -> None:
    """Compare the arguments saved with weights with the architecture of another file (config.json).

    Args:
        own: as in `from_megatron`.

    Raises:
        UsageError: they name something that is not computed here, or another architecture than `arch`.
    """
    said = _said(args, where)
    refuse_others(said, where, own)
    known: dict[str, Any] = {}
    for fact in FACTS:
        name = next((name for name in fact.megatron if name in said), None)
        if name is not None and fact.name in ("rope_theta", "rms_norm_eps", "num_experts_per_tok", "norm_topk_prob"):
            known[fact.name] = fact.read(said[name], f"{where}: {name}")
    known["rope_scaling"] = scaling_from_megatron(said, known.get("rope_theta", arch.rope_theta), where)
    if not arch.is_moe:
        known = {name: value for name, value in known.items() if name not in ("num_experts_per_tok", "norm_topk_prob")}
    if wrong := arch.unlike(dataclasses.replace(arch, **known)):
        raise UsageError(f"{where} was trained with {wrong} (config.json); correct that config.json")


def _said(args: Mapping[str, object], where: str) -> dict[str, Any]:
    """The arguments that are not None. The base inside config.json's dict of the rotary embedding is taken, too, as in
    transformers 5.
    """
    said = {name: value for name, value in args.items() if value is not None}
    for name in _HF_ROPE:
        inner = record(said.get(name) or {}, f"{where}: {name}").fields.get("rope_theta")
        outer = said.setdefault("rotary_base", said.get("rope_theta", inner)) if inner is not None else inner
        if inner != outer:
            raise UsageError(f"{where}: rotary_base {shown(outer)} and {name}.rope_theta {shown(inner)} differ")
    return said


def unlike_family(argument: str, said: bool | None, family: Family) -> str | None:
    """The contradiction between an argument of `FEATURES` and the family; None if there is none."""
    feature = next(name for name, of in FEATURES.items() if of == argument)
    if said is None or said == getattr(family, feature):
        return None
    others = {other.title: None for other in FAMILIES.values() if getattr(other, feature) == said}
    hint = f" ({', '.join(others)} {'has' if said else 'has none'})" if others else ""
    flag_name = f"--{'' if said else 'no-'}{argument.replace('_', '-')}"
    return f"{flag_name}: {family.title} has {'no' if said else 'a'} {_WORDS[argument]}{hint}"


def _needed(said: Mapping[str, object], name: str, where: str) -> int:
    if name not in said:
        raise UsageError(f"{where}: its args have no {name}; give the architecture with --hf-cfg-dir")
    return integer(said[name], f"{where}: {name}", least=1, most=2**20)


def _family(said: Mapping[str, object], where: str) -> Family:
    """The first family that agrees with every argument."""
    experts = "num_experts" in said or "num_moe_experts" in said
    if "hf_model_type" in said:
        text(said["hf_model_type"], f"{where}: hf_model_type")
    named = said.get("hf_model_type") or (said["model_type"] if isinstance(said.get("model_type"), str) else None)
    if named not in FAMILIES and said.get("hf_model_type") is None:
        named = None  # this is Megatron's ModelType or MindSpeed-LLM's "GPT", not a family
    features = {feature: bool(said[argument]) for feature, argument in FEATURES.items() if argument in said}
    for family in FAMILIES.values():
        agrees = all(getattr(family, feature) == value for feature, value in features.items())
        if agrees and (named or family.model_type) == family.model_type and family.moe == bool(experts):
            return family
    words = [f"{FEATURES[feature]} {value}" for feature, value in features.items()]
    words += [f"hf_model_type {shown(named)}"] if named else []
    known = ", ".join(FAMILIES)
    raise UsageError(f"{where}: {', '.join(words)} with{'' if experts else 'out'} experts is none of {known}")


def _scaling_arguments(scaling: RopeScaling) -> dict[str, object]:
    """MindSpeed-LLM's arguments, and those of Megatron if it has them."""
    if scaling.kind == LINEAR:
        return {"rotary_seq_len_interpolation_factor": scaling.factor}
    found: dict[str, object] = {"rope_scaling_type": scaling.kind, "rope_scaling_factor": scaling.factor}
    if scaling.kind == LLAMA3:
        usual = (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original) == (1.0, 4.0, 8192)
        return found | {
            "use_rope_scaling": usual,
            "original_max_position_embeddings": scaling.original,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    usual = scaling.attention_factor == rope.mscale(scaling.factor)
    # With mscale_all_dim 0 the numerator alone is the attention factor: 0.1 mscale ln(factor) + 1.
    weight = 1.0 if usual else (scaling.attention_factor - 1) / (rope.mscale(scaling.factor) - 1 or 1.0)
    values = {"original_max_position_embeddings": scaling.original, "mscale": weight, "mscale_all_dim": 0.0}
    values |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    found |= {f"rope_scaling_{name}": value for name, value in values.items()}
    found |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    found |= {f"yarn_{name}": value for name, value in values.items()}
    return found | {
        "yarn_rotary_scaling_factor": scaling.factor,
        "yarn_correction_range_round_to_int": scaling.truncate,
        "yarn_attention_factor": scaling.attention_factor,
    }


def scaling_from_megatron(said: Mapping[str, object], theta: float, where: str) -> RopeScaling | None:
    """The scaling of rotary embedding that arguments (without None) describe.

    Raises:
        UsageError: the scaling is not computed here, there are several, or a value that it needs is missing.
    """
    read = _NumericArgs(said, where)
    found: list[RopeScaling] = []
    kind = said.get("rope_scaling_type")
    if kind not in (None, YARN, LLAMA3):
        raise unlike(where, "rope_scaling_type", kind, f"{YARN} and {LLAMA3}")
    if said.get("position_embedding_type") == "yarn" or kind == YARN:
        found.append(_yarn(read, "yarn_" if kind is None else "rope_scaling_"))
    if kind == LLAMA3:
        low, high = read("low_freq_factor"), read("high_freq_factor")
        original = int(read("original_max_position_embeddings"))
        factor = read("rope_scaling_factor")
        found.append(
            RopeScaling(kind=LLAMA3, factor=factor, original=original, low_freq_factor=low, high_freq_factor=high)
        )
    elif said.get("use_rope_scaling"):  # Megatron's flag, with the fixed values of Llama 3.1
        found.append(RopeScaling(kind=LLAMA3, factor=read("rope_scaling_factor", 8.0), original=8192))
    if (factor := read("rotary_seq_len_interpolation_factor", 1.0)) != 1:
        found.append(RopeScaling(kind=LINEAR, factor=factor))
    for name in _HF_ROPE:
        if said.get(name):
            own = {name: {"rope_theta": theta} | record(said[name], f"{where}: {name}").fields}
            scaling = rope.from_hf(own, int(read("max_position_embeddings", 40960)), theta, where)[1]
            found += [scaling] if scaling is not None else []
    if len(set(found)) > 1:
        raise UsageError(f"{where}: its args name {' and '.join(map(str, found))}; only one of them can be used")
    return rope.checked_scaling(found[0], theta, where) if found else None


class _NumericArgs:
    """Reads numbers among arguments."""

    def __init__(self, said: Mapping[str, object], where: str) -> None:
        self.said, self.where = said, where

    def __call__(self, name: str, default: float | None = None, *others: str) -> float:
        for key in (name, *others):
            if key in self.said:
                return number(self.said[key], f"{self.where}: {key}", least=0)
        if default is None:
            raise UsageError(f"{self.where}: {name} is missing; the rotary embedding that is named needs it")
        return default

    def given(self, name: str) -> float | None:
        return self(name) if name in self.said else None


def _yarn(read: _NumericArgs, prefix: str) -> RopeScaling:
    mindspeed = prefix == "rope_scaling_"
    if not mindspeed and "yarn_rotary_scaling_factor" not in read.said and "rotary_scaling_factor" in read.said:
        read = _NumericArgs(_unprefixed_yarn(read.said), read.where)
    factor = read("rope_scaling_factor" if mindspeed else "yarn_rotary_scaling_factor")
    # MindSpeed-LLM's defaults are 1 and 0, Megatron's None; all of them mean `mscale(factor)`.
    weights = read.given(f"{prefix}mscale"), read.given(f"{prefix}mscale_all_dim")
    if mindspeed:
        weights = (1.0 if weights[0] is None else weights[0], weights[1] or 0.0)
    attention = read.given("yarn_attention_factor")
    return RopeScaling(
        kind=YARN,
        factor=factor,
        original=int(read(f"{prefix}original_max_position_embeddings")),
        attention_factor=rope.yarn_attention_factor(factor, *weights) if attention is None else attention,
        # MindSpeed-LLM renamed --rope-scaling-beta-fast to --beta-fast.
        beta_fast=read("beta_fast", 32.0, f"{prefix}beta_fast") if mindspeed else read("yarn_beta_fast", 32.0),
        beta_slow=read("beta_slow", 1.0, f"{prefix}beta_slow") if mindspeed else read("yarn_beta_slow", 1.0),
        truncate=bool(read.said.get("yarn_correction_range_round_to_int", True)),
    )


def _unprefixed_yarn(said: Mapping[str, object]) -> dict[str, object]:
    """megatron-core 0.19's flags, which have the prefix in the configuration only; its defaults."""
    own = {f"yarn_{name}": said.get(name, usual) for name, usual in (("mscale", 1.0), ("mscale_all_dim", 0.0))}
    own["yarn_rotary_scaling_factor"] = said["rotary_scaling_factor"]
    return {"yarn_original_max_position_embeddings": 4096} | own | dict(said)
