"""The facts that distinguish families of decoders. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A row of facts that hold for every model of a family.

    Attributes:
        model_type: of config.json.
        architecture: transformers' class, written into config.json.
        title: in messages.
        moe: every layer is a mixture of experts.
        qk_norm: each query and key head is normalised before rotary embedding.
        qkv_bias, o_bias: the projections of the attention have a bias.
        defaults: transformers' default for a key that config.json lacks.
        fixed: key of config.json -> the only values that this code computes; an absent key counts as the first one.
        renamed: part of a weight's usual name, such as "post_attention_layernorm" -> the family's own.
    """

    model_type: str
    architecture: str
    title: str
    moe: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, tuple[object, ...]] = dataclasses.field(default_factory=dict)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def reward_architecture(self) -> str:
        """transformers' class of its reward models."""
        return self.architecture.replace("ForCausalLM", "ForSequenceClassification")

    def hf_name(self, standard: str) -> str:
        """The family's name of the weight `standard`, the name in most families."""
        for usual, own in self.renamed.items():
            standard = standard.replace(usual, own)
        return standard
