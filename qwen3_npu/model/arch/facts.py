"""The facts of an architecture: one table for all directions. No torch.

config.json, Megatron's arguments (and the flags of the same names) and `Qwen3Arch` hold the same facts under different
names. `hf_config.py`, `megatron.py` and `args/model.py` translate with this table.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from qwen3_npu.schema import boolean, integer, number

REQUIRED: object = object()


@dataclasses.dataclass(frozen=True)
class Fact:
    """One row.

    Attributes:
        name: field of `Qwen3Arch` and key of config.json.
        read: (value, its place for messages) -> the value, with type and range checked.
        megatron: names of the argument; the first is written and is the flag.
        newer: another key of config.json, which transformers prefers.
        moe: only models with experts have it.
        negated: the argument is the negation of the fact.
        default: used if config.json lacks it and the family has no default; REQUIRED: this is an error.
        args_default: used if Megatron's arguments lack it; None: its value follows from other arguments, or it is
            an error.
    """

    name: str
    read: Callable[[object, str], object]
    megatron: tuple[str, ...] = ()
    newer: str | None = None
    moe: bool = False
    negated: bool = False
    default: object = REQUIRED
    args_default: object = None

    def turned(self, value: object) -> object:
        """The argument's value from the fact's, or the reverse."""
        return not value if self.negated else value


_COUNT = functools.partial(integer, least=1, most=2**40)
_FEW = functools.partial(integer, least=1, most=2**20)  # counts of things of which there are few
_TOKEN = functools.partial(integer, least=0, most=2**40)

FACTS: tuple[Fact, ...] = (
    Fact("vocab_size", _COUNT, ("vocab_size", "padded_vocab_size")),
    Fact("hidden_size", _COUNT, ("hidden_size",)),
    Fact("intermediate_size", _COUNT, ("ffn_hidden_size", "intermediate_size")),
    Fact("num_hidden_layers", _FEW),  # Megatron's num_layers counts no-op layers too
    Fact("num_attention_heads", _FEW, ("num_attention_heads",)),
    Fact("num_key_value_heads", _FEW, ("num_query_groups", "num_key_value_heads")),
    Fact("head_dim", _COUNT, ("kv_channels", "head_dim")),
    Fact(
        "tie_word_embeddings",
        boolean,
        ("untie_embeddings_and_output_weights",),
        negated=True,
        default=False,
        args_default=False,
    ),
    Fact("max_position_embeddings", _COUNT, ("max_position_embeddings",), args_default=40960),
    Fact("rope_theta", functools.partial(number, least=1), ("rotary_base", "rope_theta"), args_default=1_000_000.0),
    Fact(
        "rms_norm_eps",
        functools.partial(number, least=0, most=1),
        ("norm_epsilon", "layernorm_epsilon", "rms_norm_eps"),
        args_default=1e-6,
    ),
    Fact("num_experts", _FEW, ("num_experts", "num_moe_experts"), newer="num_local_experts", moe=True),
    Fact("num_experts_per_tok", _FEW, ("moe_router_topk", "num_experts_per_tok"), moe=True),
    Fact("moe_intermediate_size", _COUNT, ("moe_ffn_hidden_size", "moe_intermediate_size"), moe=True),
    # Megatron's own trainings have no such argument; see `megatron.py`.
    Fact("norm_topk_prob", boolean, ("norm_topk_prob",), moe=True, args_default=True),
    Fact("router_aux_loss_coef", number, ("moe_aux_loss_coeff",), moe=True, args_default=0.001),
    Fact("bos_token_id", _TOKEN, ("bos_token_id",), default=None),
)
