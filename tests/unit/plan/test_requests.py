"""Memory of inference: what is planned is what the cache allocates, and what fits is what a hand computation says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen3_npu.args.parallel import ParallelArgs, make_layout
from qwen3_npu.errors import UsageError
from qwen3_npu.model.cache import KVCache
from qwen3_npu.model.sizes import SIZES
from qwen3_npu.plan.device import DEVICE_SPECS, GIB
from qwen3_npu.plan.requests import find_layouts, request_memory, setup_of_inference
from qwen3_npu.plan.shape import shape_of

ROOT = Path(__file__).resolve().parents[3]


def memory(name: str, length: int, **parallel: int) -> tuple[float, float, int]:
    arch = SIZES[name]
    setup = setup_of_inference(make_layout(arch, ParallelArgs(**parallel)))
    found = request_memory(shape_of(arch), setup, DEVICE_SPECS["910B-64G"], length)
    return found.weights, found.request, found.fit


def test_a_request_takes_what_the_cache_allocates() -> None:
    """Of the last stage: its layers, its heads; and two float32 copies of the logits of one token."""
    _, request, _ = memory("qwen3-8b", 1000, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    cache = KVCache(
        range(18), slots=1, capacity=1000, groups=4, head_dim=128, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    assert request == cache.bytes + 151936 // 2 * 2 * 4


def test_what_fits_by_hand() -> None:
    weights, request, fit = memory("qwen3-8b", 4096)
    assert weights == 2 * 8_190_735_360  # the weights of huggingface.co/Qwen/Qwen3-8B
    free = 60.96 * GIB * 0.94 - 2.5 * GIB - weights
    # A pass of 4,096 tokens needs the MLP's first product and four hidden states.
    free -= 4096 * 2 * (2 * 12288 + 4 * 4096)
    assert fit == int(free // request)
    assert request == 36 * 2 * 8 * 128 * 2 * 4096 + 151936 * 8


def test_heads_that_several_devices_hold_are_not_halved_again() -> None:
    """30B-A3B has 4 key/value heads: at TP4 and at TP8 a device holds one; only its share of the logits differs."""
    four, eight = (memory("qwen3-30b-a3b", 8192, tensor_model_parallel_size=size)[1] for size in (4, 8))
    assert four - eight == 151936 / 8 * 8


def test_nothing_that_fits_says_what_is_needed() -> None:
    arch = SIZES["qwen3-235b-a22b"]
    with pytest.raises(UsageError, match=r"GiB are needed on each.*give more devices"):
        find_layouts(shape_of(arch), arch, DEVICE_SPECS["910B-64G"], devices=4, length=4096)


def test_the_command_prints_layouts_as_a_table_and_as_json() -> None:
    flags = [sys.executable, "-m", "qwen3_npu.plan", "--model", "qwen3-32b", "--devices", "4", "--inference"]
    table, data = (
        subprocess.run([*flags, *more], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
        for more in ([], ["--json"])
    )
    assert "TP4 PP1, 1 copy" in table
    found = json.loads(data)
    assert [entry["fit"] * entry["setup"]["data"] for entry in found] == sorted(
        (entry["fit"] * entry["setup"]["data"] for entry in found), reverse=True
    )
