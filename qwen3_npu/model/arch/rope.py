"""Rotary position embedding: its base and its scaling to longer sequences. No torch.

Formulas and names are those of transformers' `modeling_rope_utils` (5.x): linear, yarn (arXiv:2309.00071) and llama3.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from qwen3_npu.errors import UsageError
from qwen3_npu.schema import boolean, integer, number, record, shown

LINEAR, YARN, LLAMA3 = "linear", "yarn", "llama3"
_CHANGING = {
    "dynamic": "its frequencies change with the length of each input; remove it (within max_position_embeddings it is "
    "plain RoPE), or use yarn",
    "longrope": "its frequencies change with the length of each input; use yarn",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """A change of the rotary frequencies that is the same for every input.

    Attributes:
        kind: "linear", "yarn" or "llama3".
        factor: factor by which sequences may be longer.
        original: positions of the training before the scaling; 0 for linear.
        attention_factor: factor of cos and sin.
        beta_fast, beta_slow: of yarn: rotations within `original` above which a frequency stays, below which it is
            divided by the factor.
        truncate: of yarn: the dimensions in between begin and end at whole numbers.
        low_freq_factor, high_freq_factor: of llama3: `original` / these are the wavelengths in between.
    """

    kind: str
    factor: float
    original: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __str__(self) -> str:
        name = {LINEAR: "linear RoPE", YARN: "YaRN", LLAMA3: "llama3 RoPE"}[self.kind]
        return f"{name} x{self.factor:g}" + (f" of {self.original} positions" if self.original else "")

    def to_hf(self) -> dict[str, object]:
        """The `rope_scaling` of config.json, without default values, since other readers may not know these keys."""
        found: dict[str, object] = {"rope_type": self.kind, "factor": self.factor}
        if self.kind == LINEAR:
            return found
        found["original_max_position_embeddings"] = self.original
        if self.kind == LLAMA3:
            return found | {"low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor}
        usual = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "attention_factor": mscale(self.factor)}
        return found | {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Everything that determines how positions rotate the heads.

    Attributes:
        theta: base of the wavelengths.
        head_dim: size of a head, all of which is rotated.
    """

    theta: float
    head_dim: int
    scaling: RopeScaling | None = None

    @property
    def attention_factor(self) -> float:
        """The factor of cos and sin."""
        return self.scaling.attention_factor if self.scaling else 1.0

    @functools.cached_property
    def divisors(self) -> tuple[float, ...] | None:
        """The divisor of each of the head_dim / 2 plain frequencies theta ** (-2i / head_dim); None without scaling."""
        if self.scaling is None:
            return None
        parts = {LINEAR: self._linear_parts, YARN: self._yarn_parts, LLAMA3: self._llama3_parts}[self.scaling.kind]()
        # A part p of a frequency is divided, the rest stays: f / factor * p + f * (1 - p).
        return tuple(1.0 / (p / self.scaling.factor + 1.0 - p) if 0 < p < 1 else self._end(p) for p in parts)

    def _end(self, part: float) -> float:
        return self.scaling.factor if self.scaling and part else 1.0

    def _linear_parts(self) -> list[float]:
        return [1.0] * (self.head_dim // 2)

    def _yarn_parts(self) -> list[float]:
        s, d = self.scaling, self.head_dim
        assert s is not None
        low, high = (
            d * math.log(s.original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
            for turns in (s.beta_fast, s.beta_slow)
        )
        if s.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, d - 1)
        width = high - low if high != low else 0.001
        return [min(max((i - low) / width, 0.0), 1.0) for i in range(d // 2)]

    def _llama3_parts(self) -> list[float]:
        s, d = self.scaling, self.head_dim
        assert s is not None
        # How often a dimension turns within the original positions.
        turns = [s.original / (2 * math.pi * self.theta ** (2 * i / d)) for i in range(d // 2)]
        width = s.high_freq_factor - s.low_freq_factor
        return [min(max((s.high_freq_factor - t) / width, 0.0), 1.0) for t in turns]


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's usual multiplier of cos and sin."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def yarn_attention_factor(factor: float, weight: float | None, weight_all: float | None) -> float:
    """The multiplier of cos and sin as Megatron and MindSpeed-LLM compute it from their two `mscale` arguments."""
    if weight is None or weight_all is None:
        return mscale(factor)
    return mscale(factor, weight) / mscale(factor, weight_all)


def checked_scaling(scaling: RopeScaling, theta: float, where: str) -> RopeScaling | None:
    """The scaling, or None if it changes nothing.

    Raises:
        UsageError: its values contradict each other.
    """
    if scaling.kind == YARN and scaling.beta_fast < scaling.beta_slow:
        raise UsageError(f"{where}: beta_fast {scaling.beta_fast:g} is below beta_slow {scaling.beta_slow:g} in yarn")
    if scaling.kind == YARN and theta <= 1:
        raise UsageError(f"{where}: yarn needs a rope_theta above 1; it is {theta:g}")
    if scaling.kind == LLAMA3 and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise UsageError(
            f"{where}: high_freq_factor {scaling.high_freq_factor:g} is not above low_freq_factor "
            f"{scaling.low_freq_factor:g} in llama3"
        )
    return None if scaling.factor == 1 and scaling.attention_factor == 1 else scaling


_FACTOR = functools.partial(number, least=1)
_POSITIONS = functools.partial(integer, least=1)
_POSITIVE = functools.partial(number, least=1e-9)
# Kind -> key of rope_scaling -> how it is read. Keys of other kinds and unknown ones are refused.
_KEYS: dict[str, dict[str, Callable[[object, str], Any]]] = {
    LINEAR: {"factor": _FACTOR},
    YARN: {
        "factor": _FACTOR,
        "original_max_position_embeddings": _POSITIONS,
        "attention_factor": _POSITIVE,
        "beta_fast": _POSITIVE,
        "beta_slow": _POSITIVE,
        "mscale": number,
        "mscale_all_dim": number,
        "truncate": boolean,
    },
    LLAMA3: {
        "factor": _FACTOR,
        "original_max_position_embeddings": _POSITIONS,
        "low_freq_factor": _POSITIVE,
        "high_freq_factor": _POSITIVE,
    },
}


def from_hf(config: Mapping[str, object], positions: int, default_theta: float, where: str) -> tuple[float, Any, Any]:
    """Base and scaling in a config.json, and the dict that they come from.

    transformers 5 takes `rope_scaling` before `rope_parameters`, and a `rope_theta` inside of it before the outer one.

    Args:
        positions: max_position_embeddings.

    Returns:
        rope_theta; the `RopeScaling` or None; the dict that was used.

    Raises:
        UsageError: another kind of RoPE, or a value that is no number or out of range.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    said = dict(record(config.get(name) or {}, f"{where}: {name}").fields)
    if "full_attention" in said:
        if len(said) > 1:
            raise UsageError(f"{where}: {name} has kinds of layers {shown(sorted(said))}; one kind is supported")
        said = dict(record(said["full_attention"], f"{where}: {name}.full_attention").fields)
    place = f"{where}: {name}"
    inside = "rope_theta" in said
    theta = number(
        said["rope_theta"] if inside else config.get("rope_theta", default_theta),
        f"{place}.rope_theta" if inside else f"{where}: rope_theta",
        least=1,
    )
    for key, value in (("partial_rotary_factor", config.get("partial_rotary_factor")), *said.items()):
        if key == "partial_rotary_factor" and value not in (None, 1):
            raise UsageError(f"{where}: {key} {shown(value)} is not supported; whole heads are rotated")
    kind = said.get("rope_type", said.get("type", "default"))
    values = {k: v for k, v in said.items() if k not in ("rope_type", "type", "rope_theta", "partial_rotary_factor")}
    if kind == "default" or (kind == "dynamic" and values.get("factor") == 1):
        return theta, None, said
    return theta, checked_scaling(_scaling(kind, values, config, positions, place=place), theta, place), said


def _scaling(
    kind: object, values: dict[str, object], config: Mapping[str, object], positions: int, *, place: str
) -> RopeScaling:
    if not isinstance(kind, str) or kind not in _KEYS:
        why = _CHANGING.get(str(kind), f"one of default, {', '.join(_KEYS)} is expected")
        raise UsageError(f"{place} of type {shown(kind)} is not supported: {why}")
    if unknown := [key for key in values if key not in _KEYS[kind]]:
        raise UsageError(f"{place}.{unknown[0]} is not understood for {kind}; one of {', '.join(_KEYS[kind])} is")
    found = {k: _KEYS[kind][k](v, f"{place}.{k}") for k, v in values.items() if v is not None}
    if kind == LINEAR:
        return RopeScaling(kind=kind, factor=_needed(found, "factor", place))
    outer = config.get("original_max_position_embeddings")
    # transformers puts the outer value over the inner one when it builds the model.
    original = _POSITIONS(outer, "original_max_position_embeddings") if outer is not None else None
    found["original"] = original or found.pop("original_max_position_embeddings", positions)
    found.pop("original_max_position_embeddings", None)
    if kind == LLAMA3:
        for key in ("factor", "low_freq_factor", "high_freq_factor"):
            _needed(found, key, place)
        return RopeScaling(kind=kind, **found)
    factor = found.setdefault("factor", positions / found["original"])
    weights = found.pop("mscale", None) or None, found.pop("mscale_all_dim", None) or None
    found.setdefault("attention_factor", yarn_attention_factor(factor, *weights))
    return RopeScaling(kind=kind, **found)


def _needed(found: Mapping[str, object], key: str, place: str) -> Any:
    if key not in found:
        raise UsageError(f"{place} has no {key}")
    return found[key]
