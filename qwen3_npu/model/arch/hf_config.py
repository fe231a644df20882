"""config.json of a Hugging Face directory <-> the architecture. No torch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3_npu import log
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import rope
from qwen3_npu.model.arch.architecture import Qwen3Arch
from qwen3_npu.model.arch.facts import FACTS, REQUIRED, Fact
from qwen3_npu.model.arch.families import find_family
from qwen3_npu.model.arch.families.family import Family
from qwen3_npu.once import shared_record
from qwen3_npu.schema import integer, number, sequence, shown

_OF_REWARD_MODELS = ("id2label", "label2id", "num_labels")
# Keys whose content stands in another key, or that transformers derives; they are not written.
_NOT_WRITTEN = ("rope_parameters", "num_local_experts", "dtype", "layer_types", "original_max_position_embeddings")
_QUANTIZED = "quantization_config"  # its weights are dequantized when they are read


def from_hf_config(config: Mapping[str, object], where: str = "config.json") -> Qwen3Arch:
    """The architecture that a Hugging Face `config.json` describes.

    Both spellings are read: the published one (`rope_theta`, `num_experts`) and what transformers 5 saves
    (`rope_parameters`, `num_local_experts`). Where both are given and differ, transformers' choice is used, and the
    log says so.

    Args:
        where: the file's name, for messages.

    Raises:
        UsageError: the family is unknown, a fact is missing or has another type, or its value is not implemented.
    """
    family = find_family(config.get("model_type"), where)
    _refuse_unsupported(config, family, where)
    found: dict[str, Any] = {"model_type": family.model_type}
    for fact in FACTS:
        if fact.name != "rope_theta" and (family.moe or not fact.moe):
            found[fact.name] = _value(fact, config, family, found, where=where)
    positions, default = found["max_position_embeddings"], family.defaults.get("rope_theta", 10000.0)
    found["rope_theta"], found["rope_scaling"], said = rope.from_hf(config, positions, default, where)
    _tell_contradictions(config, found["rope_theta"], said, where)
    ending = ending_tokens(config.get("eos_token_id"), where)
    found["eos_token_id"] = ending[0] if ending else None
    return Qwen3Arch(**found, more_eos_token_ids=tuple(ending[1:]), reward=_is_reward(config, family, where))


def _is_reward(config: Mapping[str, object], family: Family, where: str) -> bool:
    """Whether it is a reward model. Raises: UsageError: a classifier of several labels."""
    if family.reward_architecture not in sequence(config.get("architectures") or [], f"{where}: architectures"):
        return False
    named = config.get("id2label")
    count = config.get("num_labels", len(named) if isinstance(named, dict) else 2)  # transformers' default
    if count != 1:
        raise UsageError(
            f"{where}: a {family.reward_architecture} of {shown(count)} labels; a reward model with 1 is read"
        )
    return True


def _value(fact: Fact, config: Mapping[str, object], family: Family, found: Mapping[str, Any], *, where: str) -> object:
    names = [name for name in (fact.newer, fact.name) if name is not None]
    said = {name: config[name] for name in names if config.get(name) is not None}
    if len(said) == 2 and len(set(map(repr, said.values()))) > 1:
        (first, value), (second, other) = said.items()
        _tell(f"{where}: {first} {shown(value)} and {second} {shown(other)} differ; {first} counts, as in transformers")
    for name, value in said.items():
        return fact.read(value, f"{where}: {name}")
    if fact.name == "head_dim" and "head_dim" not in family.defaults:
        return found["hidden_size"] // found["num_attention_heads"]
    if fact.name == "num_key_value_heads" and (fact.name in config or fact.name not in family.defaults):
        return found["num_attention_heads"]
    value = family.defaults.get(fact.name, fact.default)
    if value is REQUIRED:
        raise UsageError(f"{where}: no {' or '.join(reversed(names))}")
    return value


def _refuse_unsupported(config: Mapping[str, object], family: Family, where: str) -> None:
    for key, allowed in family.fixed.items():
        value = config.get(key)
        if value is not None and not any(type(value) is type(a) and value == a for a in allowed):
            raise UsageError(
                f"{where}: {key} {shown(value)} is not supported; {family.title} is computed with {shown(allowed[0])}"
            )
    for kind in sequence(config.get("layer_types") or [], f"{where}: layer_types"):
        if kind != "full_attention":
            raise UsageError(f"{where}: layer_types has {shown(kind)}; only full_attention is supported")


def _tell_contradictions(config: Mapping[str, object], theta: float, said: Mapping[str, object], where: str) -> None:
    """Log facts that are given twice with different values; transformers' choice has been made already."""
    outer = config.get("rope_theta")
    if outer is not None and "rope_theta" in said and number(outer, f"{where}: rope_theta") != theta:
        _tell(f"{where}: rope_theta {outer:g} and the inner one {theta:g} differ; {theta:g} counts, as in transformers")
    both = [config.get(name) for name in ("rope_scaling", "rope_parameters")]
    if all(both) and both[0] != both[1]:
        _tell(f"{where}: rope_scaling and rope_parameters differ; rope_scaling counts, as in transformers")
    named = [config.get(name) for name in ("dtype", "torch_dtype")]
    if None not in named and named[0] != named[1]:
        _tell(f"{where}: dtype {shown(named[0])} and torch_dtype {shown(named[1])} differ; the weights' own counts")


@functools.cache
def _tell(message: str) -> None:
    log.warning_once(message)


def ending_tokens(value: object, where: str) -> list[int]:
    """The ending tokens, with the first one in front."""
    if value is None:
        return []
    listed = value if isinstance(value, list) else [value]
    return [integer(token, f"{where}: eos_token_id", least=0) for token in listed]


def read_hf_config(folder: str | Path) -> dict[str, object]:
    """The `config.json` of a Hugging Face directory, as a dict.

    Raises:
        UsageError: no such directory or file, or not a JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UsageError(f"{path} does not exist; a Hugging Face model directory has a config.json")
    return shared_record(path).fields


def to_hf_config(
    arch: Qwen3Arch, carry: Mapping[str, object] | None = None, dtype: str = "bfloat16"
) -> dict[str, object]:
    """A `config.json` that transformers 4.51 and later, and 5.x, read the same way.

    The published spelling is written (`rope_theta`, `num_experts`, `torch_dtype`): transformers 4 knows no other,
    transformers 5 reads both.

    Args:
        carry: config.json of the source; its unused fields are kept.
        dtype: of the weights beside it, e.g. "bfloat16".
    """
    config = {key: value for key, value in (carry or {}).items() if key not in (*_NOT_WRITTEN, _QUANTIZED)}
    family = arch.family
    facts = {fact.name: getattr(arch, fact.name) for fact in FACTS if arch.has(fact)}
    facts["rope_scaling"] = arch.rope_scaling.to_hf() if arch.rope_scaling else None
    if arch.more_eos_token_ids:
        facts["eos_token_id"] = list(arch.eos_token_ids)
    elif not isinstance(config.get("eos_token_id"), list):
        facts["eos_token_id"] = arch.eos_token_id
    fixed = {key: allowed[0] for key, allowed in family.fixed.items()}
    if family.moe:
        fixed["output_router_logits"] = False
    defaults = {"attention_dropout": 0.0, "initializer_range": 0.02, "sliding_window": None, "use_cache": True}
    named: dict[str, object] = {"model_type": family.model_type, "torch_dtype": dtype}
    named["architectures"] = [family.reward_architecture if arch.reward else family.architecture]
    if arch.reward:
        # transformers counts labels by their names. It takes the reward of the last token that is no padding, so it
        # must know the padding token: in Qwen3 that is also the bos token.
        pad = config.get("pad_token_id")
        named |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        named["pad_token_id"] = arch.bos_token_id if pad is None else pad
    else:
        config = {key: value for key, value in config.items() if key not in _OF_REWARD_MODELS}
    return dict(sorted({**defaults, **config, **facts, **fixed, **named}.items()))
