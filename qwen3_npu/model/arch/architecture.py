"""The architecture of a model: the facts of a Hugging Face `config.json`, with Hugging Face's names. No torch.

All code that needs a shape takes it from a `Qwen3Arch`.
"""

from __future__ import annotations

import dataclasses

from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch.facts import Fact
from qwen3_npu.model.arch.families import FAMILIES
from qwen3_npu.model.arch.families.family import Family
from qwen3_npu.model.arch.rope import Rope, RopeScaling
from qwen3_npu.progress import human

_MOST_BLOCKS = 2**20  # MLPs or experts of all layers; Qwen3-235B-A22B has 12,032


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Arch:
    """The architecture of one model, of Qwen3's or another family; field names are those of `config.json`.

    A dense model has `num_experts == 0`. In a MoE model every layer is a MoE layer, as in all published ones.

    Attributes:
        model_type: the family. The number of experts decides between "qwen3" and "qwen3_moe".
        rope_scaling: scaling of the rotary embedding; None: no scaling.
        more_eos_token_ids: further tokens that end a text.
        reward: a reward model: a head of one number per token (transformers' `score`) in place of the output layer.
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
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.001
    bos_token_id: int | None = 151643
    eos_token_id: int | None = 151645
    more_eos_token_ids: tuple[int, ...] = ()
    model_type: str = "qwen3"
    reward: bool = False

    def __post_init__(self) -> None:
        if self.reward:
            object.__setattr__(self, "tie_word_embeddings", False)  # there is no output layer to tie
        if self.model_type in ("qwen3", "qwen3_moe"):
            object.__setattr__(self, "model_type", "qwen3_moe" if self.is_moe else "qwen3")
        counts = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
        for name in (counts + " head_dim").split():
            if getattr(self, name) < 1:
                raise UsageError(f"the model's {name} is {getattr(self, name)}; it must be at least 1")
        if self.num_hidden_layers * max(self.num_experts, 1) > _MOST_BLOCKS:
            what = f"{self.num_hidden_layers} layers" + (f" of {self.num_experts} experts" if self.num_experts else "")
            raise UsageError(f"the model's {what} cannot be meant; at most {_MOST_BLOCKS} blocks are read")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"the model's num_attention_heads {self.num_attention_heads} is not a multiple of its "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UsageError(f"the model's head_dim {self.head_dim} is odd; rotary embedding needs an even one")
        if self.is_moe != self.family.moe:
            raise UsageError(f"a model of type {self.model_type!r} has {'' if self.family.moe else 'no '}experts")
        if self.is_moe and not (1 <= self.num_experts_per_tok <= self.num_experts and self.moe_intermediate_size > 0):
            raise UsageError(
                f"a model with num_experts {self.num_experts} needs num_experts_per_tok between 1 and that (it is "
                f"{self.num_experts_per_tok}) and moe_intermediate_size above 0 (it is {self.moe_intermediate_size})"
            )

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def family(self) -> Family:
        """The facts of its family."""
        return FAMILIES[self.model_type]

    def as_reward(self) -> Qwen3Arch:
        """The reward model with this one's layers."""
        return dataclasses.replace(self, reward=True)

    @property
    def rope(self) -> Rope:
        """The rotary embedding."""
        return Rope(self.rope_theta, self.head_dim, self.rope_scaling)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text."""
        return (*(() if self.eos_token_id is None else (self.eos_token_id,)), *self.more_eos_token_ids)

    def has(self, fact: Fact) -> bool:
        """Whether this architecture has a fact (facts of experts belong to MoE models only)."""
        return self.is_moe or not fact.moe

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def same_weights(self, other: Qwen3Arch) -> bool:
        """Whether both have tensors of the same names and shapes."""
        names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        names += "head_dim tie_word_embeddings num_experts moe_intermediate_size model_type reward"
        return all(getattr(self, name) == getattr(other, name) for name in names.split())

    def unlike(self, trained: Qwen3Arch) -> str | None:
        """The first fact that shapes of weights do not show and in which this architecture differs from the one with
        which they were trained; None if there is none.

        A model trained without rope scaling may get one; a model trained with rope scaling needs the same.
        """
        names = ["rope_theta", "rms_norm_eps", *(["num_experts_per_tok", "norm_topk_prob"] if self.is_moe else [])]
        pairs = [(name, getattr(trained, name), getattr(self, name)) for name in names]
        if trained.rope_scaling is not None:
            pairs.append(("rope_scaling", trained.rope_scaling, self.rope_scaling or "plain RoPE"))
        wrong = [f"{name} {before}, here {now}" for name, before, now in pairs if before != now]
        return "; ".join(wrong) or None

    def __str__(self) -> str:
        kind = f"MoE {self.num_experts} experts top-{self.num_experts_per_tok}" if self.is_moe else "dense"
        tied = "reward head" if self.reward else "tied" if self.tie_word_embeddings else "untied"
        return (
            f"{self.family.title} {kind}, {self.num_hidden_layers} layers, hidden {self.hidden_size}, "
            f"{self.num_attention_heads}/{self.num_key_value_heads} heads x {self.head_dim}, "
            f"vocabulary {self.vocab_size}, {tied}, {human(parameter_count(self))} parameters"
        )


def parameter_count(arch: Qwen3Arch) -> int:
    """Number of weights, each counted once (a tied output layer is the embedding)."""
    head = 0 if arch.tie_word_embeddings else (1 if arch.reward else arch.vocab_size) * arch.hidden_size
    norms = 2 * arch.hidden_size + (2 * arch.head_dim if arch.family.qk_norm else 0) + _biases(arch)
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
    matmul = arch.num_hidden_layers * active + (1 if arch.reward else arch.vocab_size) * arch.hidden_size
    attention = arch.num_hidden_layers * seq_length * arch.num_attention_heads * arch.head_dim
    return 6.0 * matmul + 6.0 * attention


def _attention_weights(arch: Qwen3Arch) -> int:
    heads = 2 * arch.num_attention_heads + 2 * arch.num_key_value_heads  # q and o; k and v
    return heads * arch.head_dim * arch.hidden_size


def _biases(arch: Qwen3Arch) -> int:
    qkv = (arch.num_attention_heads + 2 * arch.num_key_value_heads) * arch.head_dim
    return (qkv if arch.family.qkv_bias else 0) + (arch.hidden_size if arch.family.o_bias else 0)


def _mlp_weights(arch: Qwen3Arch, experts: int) -> int:
    width = arch.moe_intermediate_size if arch.is_moe else arch.intermediate_size
    return 3 * experts * width * arch.hidden_size
