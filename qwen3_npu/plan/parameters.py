"""Numbers of weights that one rank of a stage holds: exact, from the shapes of the weight table."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

from qwen3_npu.errors import UsageError
from qwen3_npu.plan.setup import Setup
from qwen3_npu.plan.shape import Shape


@dataclasses.dataclass(frozen=True)
class Counts:
    """Weights of one rank.

    Attributes:
        dense: replicated on all data- and context-parallel ranks.
        expert: of experts, replicated on `Setup.expert_data` ranks.
    """

    dense: int = 0
    expert: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.dense + other.dense, self.expert + other.expert)

    def __mul__(self, number: int) -> Counts:
        return Counts(self.dense * number, self.expert * number)

    def part(self, share: float) -> Counts:
        """The counts multiplied by a share."""
        return Counts(round(self.dense * share), round(self.expert * share))

    @property
    def total(self) -> int:
        return self.dense + self.expert


def layer_counts(shape: Shape, setup: Setup, has_experts: bool) -> Counts:
    """Weights of one layer on one rank."""
    h, tp = shape.hidden_size, setup.tensor
    dense = 2 * h * shape.norm_vectors + _attention_count(shape, tp)
    if not has_experts:
        first = shape.gate_factor * shape.ffn_hidden_size
        dense += h * (first + shape.ffn_hidden_size) // tp
        dense += first // tp + h if shape.biases else 0
        return Counts(dense)
    dense += h * shape.num_experts + h * shape.moe_shared_ffn * (shape.gate_factor + 1) // tp
    one = h * shape.moe_ffn_hidden_size * (shape.gate_factor + 1) // setup.expert_tensor
    return Counts(dense, shape.num_experts // setup.expert * one)


def _attention_count(shape: Shape, tp: int) -> int:
    h, out = shape.hidden_size, shape.output_width
    dense = h if shape.biases else 0
    if not shape.is_mla:
        wide = shape.query_width + shape.key_width + shape.value_width
        dense += 2 * shape.head_dim if shape.qk_norm else 0
        dense += wide // tp if shape.qkv_bias or shape.biases else 0
        return dense + h * (wide + out) // tp
    # What compresses is the same on all tensor-parallel ranks; what expands is sharded by heads.
    kv, q, rotated = shape.kv_lora_rank, shape.q_lora_rank, shape.qk_pos_emb_head_dim
    dense += h * (kv + rotated) + kv + (h * q + q if q else 0)
    heads = kv * shape.num_attention_heads * (shape.qk_head_dim + shape.v_head_dim)
    return dense + (heads + (q or h) * shape.query_width + out * h) // tp


def _mtp_counts(shape: Shape, setup: Setup) -> Counts:
    """Additional weights of layers that predict later tokens: three norms and a product of two hidden states."""
    h = shape.hidden_size
    counts = Counts(2 * h * h + 3 * h * shape.norm_vectors) * shape.mtp_layers
    # They read tokens, so the last of several stages has a copy of the embedding.
    return counts + Counts(embedding_count(shape, setup) if setup.pipeline > 1 else 0)


class Linears(NamedTuple):
    """The linears and experts of one rank's layers: number of weights, largest one, and rows."""

    weights: int
    largest: int
    rows: int


def linear_counts(shape: Shape, setup: Setup, stage: int) -> Linears:
    """The weights that --qlora quantizes on one rank of a stage."""
    total, largest, rows, h, tp = 0, 0, 0, shape.hidden_size, setup.tensor
    for has_experts, number in setup.layer_kinds(shape, stage).items():
        sizes = [((shape.query_width + shape.key_width + shape.value_width) // tp, h), (h, shape.output_width // tp)]
        width, experts = shape.ffn_hidden_size // tp, 1
        if has_experts:
            width, experts = shape.moe_ffn_hidden_size // setup.expert_tensor, shape.num_experts // setup.expert
        sizes += [(experts * shape.gate_factor * width, h), (experts * h, width)]
        counts = [out * inner for out, inner in sizes]
        total, largest = total + number * sum(counts), max(largest, *counts)
        rows += number * sum(out for out, _ in sizes)
    if setup.quantized_ends:
        last = stage == setup.pipeline - 1 and not shape.reward and (not shape.tied or setup.pipeline > 1)
        total += ((stage == 0) + last) * embedding_count(shape, setup)
        rows += ((stage == 0) + last) * shape.vocab_size // tp
    return Linears(total, largest, rows)


def matrix_counts(shape: Shape, setup: Setup, stage: int) -> Counts:
    """Weights of the trained matrices of one rank's layers, which --optimizer muon updates."""
    kinds = setup.layer_kinds(shape, stage).items()
    if setup.lora_rank:
        return sum((_layer_lora(shape, setup, has_experts) * number for has_experts, number in kinds), Counts())
    expert = sum(layer_counts(shape, setup, has_experts).expert * number for has_experts, number in kinds)
    routers = sum(shape.hidden_size * shape.num_experts * number for has_experts, number in kinds if has_experts)
    return Counts(linear_counts(shape, setup, stage).weights - expert + routers, expert).part(1 - setup.frozen)


def embedding_count(shape: Shape, setup: Setup) -> int:
    return shape.vocab_size * shape.hidden_size // setup.tensor


@functools.lru_cache(maxsize=64)  # every kind of memory asks for it
def stage_counts(shape: Shape, setup: Setup, stage: int) -> Counts:
    """Weights of one rank of a pipeline stage."""
    counts = Counts()
    for has_experts, number in setup.layer_kinds(shape, stage).items():
        counts += layer_counts(shape, setup, has_experts) * number
    last = setup.pipeline - 1
    if stage == 0:
        counts += Counts(embedding_count(shape, setup) + shape.positions * shape.hidden_size)
    if stage == last:
        counts += Counts(shape.hidden_size * shape.norm_vectors)
        if shape.reward:
            counts += Counts(shape.hidden_size)
        elif not shape.tied or setup.pipeline > 1:  # a tied output layer of another stage is a copy
            counts += Counts(embedding_count(shape, setup))
        if shape.mtp_layers:
            counts += _mtp_counts(shape, setup)
    return counts


def largest_count(shape: Shape, setup: Setup, stage: int) -> float:
    """Weights of the largest trained tensor of one rank of a stage; with a sharded optimizer, its share of it."""
    h, tp = shape.hidden_size, setup.tensor
    dense_copies, expert_copies = 1, 1
    if setup.distributed_optimizer:
        dense_copies, expert_copies = setup.data * setup.context, setup.expert_data
    if setup.lora_rank:
        widest = max(
            shape.query_width + shape.key_width + shape.value_width, shape.gate_factor * shape.ffn_hidden_size, h
        )
        return setup.lora_rank * widest / dense_copies
    mlp = 0 if shape.is_moe else shape.gate_factor * shape.ffn_hidden_size
    most: float = h * max(shape.query_width + shape.key_width + shape.value_width, mlp) / tp
    has_output = not shape.reward and (not shape.tied or setup.pipeline > 1)
    if stage == 0 or (stage == setup.pipeline - 1 and has_output):
        most = max(most, float(embedding_count(shape, setup)))
    if not shape.is_moe:
        return most / dense_copies
    # The experts of a rank are one tensor of each linear.
    experts = shape.num_experts // setup.expert
    rows = experts * h * shape.gate_factor * shape.moe_ffn_hidden_size / setup.expert_tensor
    return max(most / dense_copies, rows / expert_copies)


def trained_counts(shape: Shape, setup: Setup, stage: int) -> Counts:
    """Weights of one rank of a stage that have gradients."""
    if setup.lora_rank:
        return lora_counts(shape, setup, stage)
    return stage_counts(shape, setup, stage).part(1 - setup.frozen)


def lora_counts(shape: Shape, setup: Setup, stage: int) -> Counts:
    """Weights of the adapters of one rank of a stage."""
    total = Counts()
    for has_experts, number in setup.layer_kinds(shape, stage).items():
        total += _layer_lora(shape, setup, has_experts) * number
    if shape.reward and stage == setup.pipeline - 1:
        total += Counts(shape.hidden_size)  # the head is trained with the adapter
    ends = ("embedding" in setup.lora_targets and stage == 0) + (
        "output" in setup.lora_targets and stage == setup.pipeline - 1
    )
    total += Counts(setup.lora_rank * (shape.hidden_size + shape.vocab_size // setup.tensor)) * ends
    if setup.dora:
        total += Counts(shape.hidden_size) * ("embedding" in setup.lora_targets and stage == 0)
        last = "output" in setup.lora_targets and stage == setup.pipeline - 1
        total += Counts(shape.vocab_size // setup.tensor) * last
    return total


def _layer_lora(shape: Shape, setup: Setup, has_experts: bool) -> Counts:
    h, tp, r, targets = shape.hidden_size, setup.tensor, setup.lora_rank, setup.lora_targets
    if shape.is_mla:
        raise UsageError("adapters of multi-latent attention (kv_lora_rank) cannot be planned")
    dense = expert = 0
    tall = r + setup.dora  # numbers beside a row of the weight: of B, and with DoRA its length
    if "linear_qkv" in targets:
        dense += r * h + tall * (shape.query_width + 2 * shape.key_width) // tp
    if "linear_proj" in targets:
        dense += r * shape.query_width // tp + tall * h
    if not has_experts:
        if "linear_fc1" in targets:
            dense += r * h + tall * shape.gate_factor * shape.ffn_hidden_size // tp
        if "linear_fc2" in targets:
            dense += r * shape.ffn_hidden_size // tp + tall * h
        return Counts(dense)
    experts, width = shape.num_experts // setup.expert, shape.moe_ffn_hidden_size // setup.expert_tensor
    if "linear_fc1" in targets:
        expert += experts * (r * h + tall * shape.gate_factor * width)
    if "linear_fc2" in targets:
        expert += experts * (r * width + tall * h)
    return Counts(dense, expert)
