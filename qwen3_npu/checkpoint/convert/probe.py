"""Logits of a few tokens, computed from a source's weights with numpy, one tensor at a time in memory.

This checks a LoRA merge: base and adapter side by side against the merged weights on disk. The complete model (all
layers, all experts that the tokens choose) is computed in float32 with the formulas of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from qwen3_npu import log
from qwen3_npu.checkpoint.binary.dtypes import Region, full, row_blocks, to_float32
from qwen3_npu.checkpoint.convert.plan import ConversionPlan
from qwen3_npu.checkpoint.formats.adapters import MergedSource
from qwen3_npu.checkpoint.formats.open import open_checkpoint
from qwen3_npu.checkpoint.mapping.source import Source
from qwen3_npu.checkpoint.mapping.table import EMBEDDING, OUTPUT, SCORE
from qwen3_npu.model.arch import Qwen3Arch


class Weights:
    """A source's tensors as float32 and as linear maps; an adapter is applied beside its base, not merged."""

    def __init__(self, source: Source) -> None:
        self.adapter = source if isinstance(source, MergedSource) else None
        self.source = source.base if isinstance(source, MergedSource) else source

    def read(self, name: str, region: Region) -> np.ndarray:
        name = self.source.arch.family.hf_name(name)
        source = self.adapter if self.adapter is not None and name == SCORE.hf[0] else self.source
        return to_float32(source.read(name, region), source.dtype(name))

    def vector(self, name: str, size: int) -> np.ndarray:
        return self.read(name, ((0, size),))

    def row(self, name: str, number: int, columns: int) -> np.ndarray:
        """One row of an embedding, [1, columns]."""
        out = self.read(name, ((number, number + 1), (0, columns)))
        name = self.source.arch.family.hf_name(name)
        if self.adapter is not None and self.adapter.is_adapted(name):
            rank = (0, self.adapter.lora.r)
            b = self.adapter.matrix(name, "B", ((0, columns), rank))
            out += (
                np.float32(self.adapter.lora.scale)
                * (b @ self.adapter.matrix(name, "A", (rank, (number, number + 1)))).T
            )
            if self.adapter.lora.is_dora:
                out *= self.adapter.turned_factors(name, (0, columns))
        return out

    def linear(self, name: str, x: np.ndarray, rows: int) -> np.ndarray:
        """x W^T (+ scale x A^T B^T): [tokens, columns] -> [tokens, rows]."""
        columns = x.shape[1]
        out = np.empty((len(x), rows), np.float32)
        for block in row_blocks(full((rows, columns)), 4):
            out[:, slice(*block[0])] = x @ self.read(name, block).T
        name = self.source.arch.family.hf_name(name)
        if self.adapter is not None and self.adapter.is_adapted(name):
            rank = (0, self.adapter.lora.r)
            inner = x @ self.adapter.matrix(name, "A", (rank, (0, columns))).T
            outer = inner @ self.adapter.matrix(name, "B", ((0, rows), rank)).T
            out += np.float32(self.adapter.lora.scale) * outer
            if self.adapter.lora.is_dora:
                for some, _ in row_blocks(full((rows, columns)), 4):
                    directions = self.adapter.directions(name, some)
                    out[:, slice(*some)] *= self.adapter.factors(name, some, directions)
        return out


def logits(source: Source, tokens: Sequence[int]) -> np.ndarray:
    """[tokens, vocabulary] float32 of one sequence; of a reward model [tokens, 1]."""
    arch, weights = source.arch, Weights(source)
    embedding = EMBEDDING.hf[0]
    x = np.concatenate([weights.row(embedding, token, arch.hidden_size) for token in tokens])
    for layer in range(arch.num_hidden_layers):
        name = f"model.layers.{layer}."
        normed = _rms_norm(x, weights.vector(f"{name}input_layernorm.weight", arch.hidden_size), arch)
        x = x + _attention(weights, f"{name}self_attn.", normed, arch)
        normed = _rms_norm(x, weights.vector(f"{name}post_attention_layernorm.weight", arch.hidden_size), arch)
        x = x + (_experts if arch.is_moe else _mlp)(weights, f"{name}mlp.", normed, arch)
    x = _rms_norm(x, weights.vector("model.norm.weight", arch.hidden_size), arch)
    if arch.reward:
        return weights.linear(SCORE.hf[0], x, 1)
    return weights.linear(embedding if arch.tie_word_embeddings else OUTPUT.hf[0], x, arch.vocab_size)


def probe_tokens(arch: Qwen3Arch, count: int = 4) -> list[int]:
    """A few tokens spread over the vocabulary."""
    return [(2 * i + 1) * arch.vocab_size // (2 * count) for i in range(count)]


def check_merge(plan: ConversionPlan, root: Path) -> None:
    """Print the largest difference between logits of the merged weights and of base and adapter side by side."""
    tokens = probe_tokens(plan.contents.arch)
    source, merged = plan.sources(), open_checkpoint(root)
    expected, got = logits(source, tokens), logits(merged, tokens)
    source.close()
    merged.close()
    log.info(
        f"LoRA check: logits(base + adapter) and logits(merged) differ by at most {np.abs(expected - got).max():.3g}; "
        f"the largest is {np.abs(expected).max():.3g} ({len(tokens)} tokens, {plan.dtype.torch} weights, float32 math)"
    )


def _rms_norm(x: np.ndarray, weight: np.ndarray, arch: Qwen3Arch) -> np.ndarray:
    return weight * (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(arch.rms_norm_eps)))


def _rotate(x: np.ndarray, arch: Qwen3Arch) -> np.ndarray:
    """Rotary embedding of [tokens, heads, head_dim], halves rotated as Hugging Face does."""
    half = arch.head_dim // 2
    frequencies = arch.rope_theta ** (-np.arange(half, dtype=np.float32) / half)
    frequencies = frequencies / np.array(arch.rope.divisors or 1.0, np.float32)
    angles = np.outer(np.arange(len(x), dtype=np.float32), frequencies).astype(np.float32)[:, None, :]
    first, second = x[..., :half], x[..., half:]
    cos, sin = (wave(angles) * np.float32(arch.rope.attention_factor) for wave in (np.cos, np.sin))
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attention(weights: Weights, name: str, x: np.ndarray, arch: Qwen3Arch) -> np.ndarray:
    n, d, groups = len(x), arch.head_dim, arch.num_key_value_heads

    def heads(projection: str, count: int) -> np.ndarray:
        out = weights.linear(f"{name}{projection}_proj.weight", x, count * d)
        bias = weights.vector(f"{name}{projection}_proj.bias", count * d) if arch.family.qkv_bias else np.float32(0)
        return (out + bias).reshape(n, count, d)

    def normed(projection: str, count: int) -> np.ndarray:
        out = heads(projection, count)
        return (
            _rms_norm(out, weights.vector(f"{name}{projection}_norm.weight", d), arch) if arch.family.qk_norm else out
        )

    q, k = (_rotate(normed(*which), arch) for which in (("q", arch.num_attention_heads), ("k", groups)))
    k, v = (np.repeat(t, arch.heads_per_group, axis=1) for t in (k, heads("v", groups)))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.float32(d**0.5)
    scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
    mixed = np.einsum("hqk,khd->qhd", _softmax(scores), v).reshape(n, -1)
    out = weights.linear(f"{name}o_proj.weight", mixed, arch.hidden_size)
    return out + weights.vector(f"{name}o_proj.bias", arch.hidden_size) if arch.family.o_bias else out


def _mlp(weights: Weights, name: str, x: np.ndarray, arch: Qwen3Arch) -> np.ndarray:
    width = arch.moe_intermediate_size if arch.is_moe else arch.intermediate_size
    gate = weights.linear(f"{name}gate_proj.weight", x, width)
    up = weights.linear(f"{name}up_proj.weight", x, width)
    return weights.linear(f"{name}down_proj.weight", gate / (1 + np.exp(-gate)) * up, arch.hidden_size)


def _experts(weights: Weights, name: str, x: np.ndarray, arch: Qwen3Arch) -> np.ndarray:
    share = _softmax(weights.linear(f"{name}gate.weight", x, arch.num_experts))
    chosen = np.argsort(-share, axis=-1, kind="stable")[:, : arch.num_experts_per_tok]
    weight = np.take_along_axis(share, chosen, axis=-1)
    if arch.norm_topk_prob:
        weight = weight / weight.sum(axis=-1, keepdims=True)
    out = np.zeros_like(x)
    for expert, (tokens, places) in _by_expert(chosen):
        part = _mlp(weights, f"{name}experts.{expert}.", x[tokens], arch)
        out[tokens] += part * weight[tokens, places][:, None]
    return out


def _by_expert(chosen: np.ndarray) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
    """Each chosen expert, with the tokens that chose it and its place in their choices."""
    for expert in np.unique(chosen):
        yield int(expert), np.nonzero(chosen == expert)


def _softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
