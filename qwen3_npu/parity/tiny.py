"""Small random models and token files, made with numpy in milliseconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import F32, DType, from_float32
from qwen3_npu.checkpoint.binary.safetensors import SafetensorsWriter
from qwen3_npu.checkpoint.formats.huggingface import SINGLE, write_config
from qwen3_npu.checkpoint.mapping.table import hf_shapes
from qwen3_npu.data.train.token_file import IndexedWriter, publish
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.model.arch.rope import YARN, RopeScaling

# The head size is not hidden / heads, heads are grouped, and four layers make two stages of two chunks.
DENSE = Qwen3Arch(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    tie_word_embeddings=False,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=1,
)


_KINDS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "few": {"num_key_value_heads": 2},  # fewer key/value heads than ranks at TP4
    "qwen2": {"model_type": "qwen2", "head_dim": 8},
    # The original length is so short that most of the tiny documents exceed it.
    "yarn": {"rope_theta": 1e4, "rope_scaling": RopeScaling(kind=YARN, factor=4, original=16, attention_factor=1.3)},
}


def arch(kind: str = "untied", **changes: object) -> Qwen3Arch:
    """A tiny "untied", "tied", "moe", "few", "qwen2" or "yarn" model, with changes."""
    return dataclasses.replace(DENSE, **{**_KINDS[kind], **changes})


def write_model(folder: Path, model: Qwen3Arch, *, seed: int = 0, dtype: DType = F32, gate: float = 1.0) -> Path:
    """A Hugging Face directory with random weights, norms unequal to one, so that a lost norm shows.

    Args:
        gate: factor on the routers' weights; rounding changes fewer choices of experts with a larger one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shapes = hf_shapes(model)
    writer = SafetensorsWriter(folder / SINGLE, {name: (dtype, shape) for name, shape in shapes.items()})
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, dtype=np.float32)
        values = 1 + 0.2 * values if len(shape) == 1 else values * shape[-1] ** -0.5
        values *= gate if name.endswith(".gate.weight") else 1.0
        writer.write(name, from_float32(values.astype(np.float32), dtype))
    writer.close()
    write_config(model, None, folder, dtype)
    return folder


def write_tokens(prefix: Path, *, vocab: int = 256, documents: int = 120, seed: int = 0) -> Path:
    """A `.bin`/`.idx` pair of learnable documents: each token is the previous one plus 1, 2 or 3."""
    rng = np.random.default_rng(seed)
    writer = IndexedWriter(prefix)
    lengths = rng.integers(20, 120, documents)
    tokens = [(rng.integers(vocab) + np.cumsum(rng.integers(1, 4, n))) % (vocab - 2) + 2 for n in lengths]
    writer.add(np.concatenate(tokens).astype(np.int32), lengths.astype(np.int32))
    publish([writer])
    return prefix


def write_instructions(
    prefix: Path, *, pack: int = 0, count: int = 24, vocab: int = 256, longest: int = 30, seed: int = 0
) -> Path:
    """Instruction data: conversations of one or two turns, whose answers continue their questions.

    Args:
        pack: tokens of a pack, as --pack --neat-pack; 0: a conversation per sample.
        count: samples.
    """
    rng = np.random.default_rng(seed)
    writers = [IndexedWriter(f"{prefix}_packed_{name}_document") for name in ("input_ids", "attention_mask", "labels")]
    for _ in range(count):
        ids: list[int] = []
        labels: list[int] = []
        segments: list[int] = []
        while True:
            conversation = [_turn(rng, vocab, longest) for _ in range(rng.integers(1, 3))]
            size = sum(len(turn) for turn, _ in conversation)
            if pack and len(ids) + size > pack:
                break
            number = segments[-1] + 1 if segments else 1
            for turn, answer in conversation:
                ids += turn
                labels += [-100] * (len(turn) - answer) + turn[-answer:]
                segments += [number] * len(turn)
            if not pack:
                break
        padding = pack - len(ids) if pack else 0
        columns = ids + [0] * padding, (segments if pack else [1] * len(ids)) + [0] * padding, labels + [-100] * padding
        for writer, column in zip(writers, columns, strict=True):
            writer.add(np.array(column, np.int32), np.array([len(column)], np.int32))
    publish(writers)
    return prefix


def _turn(rng: np.random.Generator, vocab: int, longest: int) -> tuple[list[int], int]:
    """Tokens of a question with its answer, and the number of tokens in the answer."""
    size = int(rng.integers(6, longest // 2))
    start, step = int(rng.integers(vocab)), int(rng.integers(1, 4))
    tokens = [(start + step * i) % (vocab - 2) + 2 for i in range(size)]
    return tokens, int(rng.integers(2, size - 2))
