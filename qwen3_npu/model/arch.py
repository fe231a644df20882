"""What a Qwen3 model is: the facts of a Hugging Face `config.json`, under Hugging Face's names. No torch.

Everything that needs a shape asks a `Qwen3Arch`. Megatron's names for the same facts live in `model/config.py` only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3_npu.errors import UsageError
from qwen3_npu.progress import human
from qwen3_npu.schema import read_record

DENSE, MOE = "qwen3", "qwen3_moe"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Arch:
    """The architecture of one Qwen3 model; field names are those of the published `config.json` files.

    A dense model has `num_experts == 0`. In a MoE model every layer is a MoE layer, as in all published ones.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool
    max_position_embeddings: int = 40960
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.001
    bos_token_id: int | None = 151643
    eos_token_id: int | None = 151645

    def __post_init__(self) -> None:
        counts = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
        for name in (counts + " head_dim").split():
            if getattr(self, name) < 1:
                raise UsageError(f"the model's {name} is {getattr(self, name)}; it must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"the model's num_attention_heads {self.num_attention_heads} is not a multiple of its "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UsageError(f"the model's head_dim {self.head_dim} is odd; rotary embedding needs an even one")
        if self.is_moe and not (1 <= self.num_experts_per_tok <= self.num_experts and self.moe_intermediate_size > 0):
            raise UsageError(
                f"a model with num_experts {self.num_experts} needs num_experts_per_tok between 1 and that (it is "
                f"{self.num_experts_per_tok}) and moe_intermediate_size above 0 (it is {self.moe_intermediate_size})"
            )

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def same_weights(self, other: Qwen3Arch) -> bool:
        """Whether both have tensors of the same names and shapes."""
        names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        names += "head_dim tie_word_embeddings num_experts moe_intermediate_size"
        return all(getattr(self, name) == getattr(other, name) for name in names.split())

    def __str__(self) -> str:
        kind = f"MoE {self.num_experts} experts top-{self.num_experts_per_tok}" if self.is_moe else "dense"
        tied = "tied" if self.tie_word_embeddings else "untied"
        return (
            f"Qwen3 {kind}, {self.num_hidden_layers} layers, hidden {self.hidden_size}, "
            f"{self.num_attention_heads}/{self.num_key_value_heads} heads x {self.head_dim}, "
            f"vocabulary {self.vocab_size}, {tied}, {human(parameter_count(self))} parameters"
        )


def from_hf_config(config: Mapping[str, Any], where: str = "config.json") -> Qwen3Arch:
    """The architecture that a Hugging Face `config.json` describes.

    Both spellings are read: the published one (`rope_theta`, `num_experts`) and what transformers 5 saves
    (`rope_parameters`, `num_local_experts`).

    Args:
        where: the file's name, for messages.

    Raises:
        UsageError: not a Qwen3 model, a fact is missing, or a fact that this code does not implement.
    """
    kind = config.get("model_type")
    if kind not in (DENSE, MOE):
        raise UsageError(f"{where}: model_type is {kind!r}; only {DENSE!r} and {MOE!r} are supported")
    _refuse_unsupported(config, where)

    def need(*names: str) -> Any:
        for name in names:
            if config.get(name) is not None:
                return config[name]
        raise UsageError(f"{where}: no {' or '.join(names)}")

    heads, hidden = need("num_attention_heads"), need("hidden_size")
    # Qwen3Config's own default is 128; Qwen3MoeConfig has none and falls back to hidden / heads.
    head_dim = config.get("head_dim") or (128 if kind == DENSE else hidden // heads)
    rope = config.get("rope_parameters") or {}
    experts: dict[str, Any] = {}
    if kind == MOE:
        experts = {
            "num_experts": need("num_experts", "num_local_experts"),
            "num_experts_per_tok": need("num_experts_per_tok"),
            "moe_intermediate_size": need("moe_intermediate_size"),
            "norm_topk_prob": bool(config.get("norm_topk_prob", False)),
            "router_aux_loss_coef": float(config.get("router_aux_loss_coef", 0.001)),
        }
    eos = config.get("eos_token_id")
    return Qwen3Arch(
        vocab_size=need("vocab_size"),
        hidden_size=hidden,
        intermediate_size=need("intermediate_size"),
        num_hidden_layers=need("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=config.get("max_position_embeddings") or 40960,
        rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        rms_norm_eps=float(config.get("rms_norm_eps") or 1e-6),
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=eos[0] if isinstance(eos, list) else eos,
        **experts,
    )


def _refuse_unsupported(config: Mapping[str, Any], where: str) -> None:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    wrong = [
        (rope_type != "default", f"rope scaling of type {rope_type!r}", "train with plain RoPE (rope_scaling null)"),
        (config.get("hidden_act", "silu") != "silu", f"hidden_act {config.get('hidden_act')!r}", "Qwen3 uses silu"),
        (bool(config.get("attention_bias")), "attention_bias true", "Qwen3 has no attention bias"),
        (bool(config.get("use_sliding_window")), "use_sliding_window true", "Qwen3 is published with it off"),
        (bool(config.get("mlp_only_layers")), "mlp_only_layers", "every layer of a Qwen3-MoE has experts"),
        (config.get("decoder_sparse_step", 1) != 1, "decoder_sparse_step other than 1", "Qwen3-MoE has 1"),
    ]
    for is_wrong, what, why in wrong:
        if is_wrong:
            raise UsageError(f"{where}: {what} is not supported; {why}")


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """The `config.json` of a Hugging Face directory, as a dict.

    Raises:
        UsageError: no such directory or file, or not a JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UsageError(f"{path} does not exist; a Hugging Face model directory has a config.json")
    return read_record(path).fields


def to_hf_config(arch: Qwen3Arch, carry: Mapping[str, Any] | None = None, dtype: str = "bfloat16") -> dict[str, Any]:
    """A `config.json` that transformers 4.51 and later, and 5.x, read the same way.

    The published spelling is written (`rope_theta`, `num_experts`, `torch_dtype`): transformers 4 knows no other,
    transformers 5 reads both.

    Args:
        carry: a config the model came from; what this code does not use of it is kept.
        dtype: of the weights beside it, e.g. "bfloat16".
    """
    config = dict(carry or {})
    for renamed in ("rope_parameters", "num_local_experts", "dtype", "layer_types"):
        config.pop(renamed, None)
    facts = dataclasses.asdict(arch)
    if not arch.is_moe:
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
            facts.pop(name)
        facts.pop("router_aux_loss_coef")
    else:
        facts |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False}
    if isinstance(config.get("eos_token_id"), list):
        facts.pop("eos_token_id")
    defaults = {"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02}
    defaults |= {"rope_scaling": None, "sliding_window": None, "use_cache": True, "use_sliding_window": False}
    fixed = {
        "architectures": ["Qwen3MoeForCausalLM" if arch.is_moe else "Qwen3ForCausalLM"],
        "model_type": MOE if arch.is_moe else DENSE,
        "torch_dtype": dtype,
    }
    return dict(sorted({**defaults, **config, **facts, **fixed}.items()))


def parameter_count(arch: Qwen3Arch) -> int:
    """Number of weights, each counted once (a tied output layer is the embedding)."""
    head = 0 if arch.tie_word_embeddings else arch.vocab_size * arch.hidden_size
    norms = 2 * arch.hidden_size + 2 * arch.head_dim
    router = arch.num_experts * arch.hidden_size
    per_layer = _attention_weights(arch) + norms + router + _mlp_weights(arch, max(arch.num_experts, 1))
    return arch.vocab_size * arch.hidden_size + head + arch.num_hidden_layers * per_layer + arch.hidden_size


def flops_per_token(arch: Qwen3Arch, seq_length: float) -> float:
    """Floating point operations of forward and backward for one token of a sequence of `seq_length` tokens (or a mean).

    6 x (weights of the matrix multiplications that the token meets) + 6 x layers x seq_length x heads x head_dim:
    causal attention counted once per pair that is not masked. The same formula as Megatron-Bridge's cards.
    Recomputed activations are not counted.
    """
    active = _attention_weights(arch) + _mlp_weights(arch, arch.num_experts_per_tok if arch.is_moe else 1)
    active += arch.num_experts * arch.hidden_size  # the router
    matmul = arch.num_hidden_layers * active + arch.vocab_size * arch.hidden_size
    attention = arch.num_hidden_layers * seq_length * arch.num_attention_heads * arch.head_dim
    return 6.0 * matmul + 6.0 * attention


def _attention_weights(arch: Qwen3Arch) -> int:
    heads = 2 * arch.num_attention_heads + 2 * arch.num_key_value_heads  # q and o; k and v
    return heads * arch.head_dim * arch.hidden_size


def _mlp_weights(arch: Qwen3Arch, experts: int) -> int:
    width = arch.moe_intermediate_size if arch.is_moe else arch.intermediate_size
    return 3 * experts * width * arch.hidden_size
