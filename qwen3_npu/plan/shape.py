"""The sizes of a decoder that memory and time depend on: any GPT or mixture of experts, not Qwen3 alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from qwen3_npu import schema
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a decoder. Names are Megatron's.

    Attributes:
        num_query_groups: number of key/value heads.
        vocab_size: number of rows of the padded embedding.
        tied: the output layer is the embedding.
        reward: a head of one number per token in place of the output layer.
        gated: the MLP has a gate (SwiGLU), so its first matrix is twice as wide.
        num_experts: experts of a MoE layer; 0: a dense model.
        moe_dense_layers: leading layers without experts.
        moe_shared_ffn: width of the expert that every token meets; 0: there is none.
        qk_norm, qkv_bias, biases: extra vectors: norms of query and key heads, biases of q, k and v, of all linears.
        positions: rows of a learned position embedding; 0: there is none.
        norm_vectors: vectors of one norm: 1 for RMSNorm, 2 for LayerNorm.
        kv_lora_rank, q_lora_rank: widths of multi-latent attention (DeepSeek-V2, arXiv:2405.04434); 0: keys and values,
            or queries, are not compressed. `head_dim` and `num_query_groups` mean nothing then.
        qk_head_dim, qk_pos_emb_head_dim, v_head_dim: of multi-latent attention: a head's width without and with
            position, and of its values.
        mtp_layers: layers behind the last that predict later tokens (DeepSeek-V3, arXiv:2412.19437).
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    tied: bool = False
    reward: bool = False
    gated: bool = True
    num_experts: int = 0
    moe_topk: int = 0
    moe_ffn_hidden_size: int = 0
    moe_dense_layers: int = 0
    moe_shared_ffn: int = 0
    qk_norm: bool = False
    qkv_bias: bool = False
    biases: bool = False
    positions: int = 0
    norm_vectors: int = 1
    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    qk_head_dim: int = 0
    qk_pos_emb_head_dim: int = 0
    v_head_dim: int = 0
    mtp_layers: int = 0

    def __post_init__(self) -> None:
        sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim")
        for name in (*sizes, "vocab_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"the shape's {name} is {getattr(self, name)}; it must be at least 1")
        if self.is_moe and not (1 <= self.moe_topk <= self.num_experts and self.moe_ffn_hidden_size > 0):
            raise UsageError(
                f"a shape with num_experts {self.num_experts} needs moe_topk between 1 and that (it is "
                f"{self.moe_topk}) and moe_ffn_hidden_size above 0 (it is {self.moe_ffn_hidden_size})"
            )
        if self.is_mla and not (self.qk_head_dim and self.v_head_dim):
            raise UsageError(f"a shape with kv_lora_rank {self.kv_lora_rank} needs qk_head_dim and v_head_dim")

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def is_mla(self) -> bool:
        """Multi-latent attention."""
        return self.kv_lora_rank > 0

    @property
    def query_width(self) -> int:
        """Width of the queries of all heads."""
        return self.num_attention_heads * (
            self.qk_head_dim + self.qk_pos_emb_head_dim if self.is_mla else self.head_dim
        )

    @property
    def key_width(self) -> int:
        return self.query_width if self.is_mla else self.num_query_groups * self.head_dim

    @property
    def value_width(self) -> int:
        return self.num_attention_heads * self.v_head_dim if self.is_mla else self.key_width

    @property
    def output_width(self) -> int:
        """Width of what attention returns."""
        return self.num_attention_heads * (self.v_head_dim if self.is_mla else self.head_dim)

    @property
    def gate_factor(self) -> int:
        """Width of the MLP's first product, in FFN widths."""
        return 2 if self.gated else 1

    def has_experts(self, layer: int) -> bool:
        return self.is_moe and layer >= self.moe_dense_layers


# Field of `Shape` -> field of `Qwen3Arch`.
_ARCH_NAMES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "tied": "tie_word_embeddings",
    "reward": "reward",
    "num_experts": "num_experts",
    "moe_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
}


def shape_of(arch: Qwen3Arch, padded_vocab_size: int | None = None) -> Shape:
    """The sizes of a model of this project."""
    sizes = {name: getattr(arch, theirs) for name, theirs in _ARCH_NAMES.items()}
    sizes["vocab_size"] = padded_vocab_size or arch.vocab_size
    return Shape(**sizes, qk_norm=arch.family.qk_norm, qkv_bias=arch.family.qkv_bias)


def arch_of(shape: Shape) -> Qwen3Arch:
    """An architecture with these sizes, for the checks of a layout."""
    return Qwen3Arch(**{theirs: getattr(shape, name) for name, theirs in _ARCH_NAMES.items()})


def read_shape(path: Path) -> Shape:
    """The sizes in a JSON file; names are those of `Shape`, `head_dim` is by default hidden_size / heads.

    Raises:
        UsageError: the file is no JSON object, or a size is missing, unknown or out of range.
    """
    found = schema.read_record(path, strict=True)
    fields = dataclasses.fields(Shape)
    found.only([field.name for field in fields])
    values: dict[str, Any] = {}
    for field in fields:
        if field.name not in found.fields:
            continue
        is_switch = field.type == "bool"
        values[field.name] = found.boolean(field.name) if is_switch else found.integer(field.name, least=0, most=10**7)
    hidden = found.integer("hidden_size", least=1)
    heads = found.integer("num_attention_heads", least=1)
    values.setdefault("num_query_groups", heads)
    values.setdefault("head_dim", hidden // heads)
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise UsageError(f"{path} has no {', '.join(missing)}")
    return Shape(**values)
