"""A Hugging Face directory with random bfloat16 weights of a published size, for benchmarks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import BF16, from_float32
from qwen3_npu.checkpoint.binary.safetensors import SafetensorsWriter
from qwen3_npu.checkpoint.formats.huggingface import SINGLE, write_config
from qwen3_npu.checkpoint.mapping.table import hf_shapes
from qwen3_npu.model.arch import Qwen3Arch


def make_model(folder: Path, arch: Qwen3Arch) -> Path:
    """Normal weights of standard deviation 0.02, norms of 1; made once per folder."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shapes = hf_shapes(arch)
    writer = SafetensorsWriter(folder / SINGLE, {name: (BF16, shape) for name, shape in shapes.items()})
    block = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32) * np.float32(0.02)
    for number, (name, shape) in enumerate(shapes.items()):
        # One block of numbers, another part of it for every tensor: quick, and no two tensors are equal.
        values = (
            np.ones(shape, np.float32) if len(shape) == 1 else np.resize(np.roll(block, 977 * number), math.prod(shape))
        )
        writer.write(name, from_float32(values.reshape(shape), BF16))
    writer.close()
    write_config(arch, None, folder, BF16)
    return folder
