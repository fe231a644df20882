"""What the plan says that a layer keeps on an NPU, against torch_npu's own autograd."""

from __future__ import annotations

import dataclasses

import pytest

import saved
from qwen3_npu.plan.activations import NPU, layer_bytes
from qwen3_npu.plan.setup import Setup
from qwen3_npu.plan.shape import shape_of
from worlds import World


@pytest.fixture(scope="module")
def counted(npu_worlds: dict[int, World]) -> dict[str, int]:
    """Case -> bytes that a layer keeps on a simulated NPU."""
    return npu_worlds[1].run("layers_saved")


@pytest.mark.parametrize("case", [case for case in saved.CASES if case != "dense: recomputed"])
def test_a_layer_keeps_what_is_planned(counted: dict[str, int], case: str) -> None:
    shape = shape_of(saved.model(saved.CASES[case][0]))
    setup = saved.setup(case)
    planned = layer_bytes(shape, setup, shape.is_moe, NPU)
    assert counted[case] == planned


def test_activations_on_the_host_take_nothing_on_the_device(
    npu_worlds: dict[int, World], models: dict[str, str], tokens: str
) -> None:
    """Of four layers, three have swapped theirs while the loss is computed; the most bytes are held when one of them
    comes back."""
    flags = ["--seq-length", "32", "--lr", "1e-3", "--train-iters", "2", "--eval-iters", "0", "--bf16"]
    flags += ["--micro-batch-size", "4", "--load", models["untied"], "--data-path", tokens]
    plain, swapped = (npu_worlds[1].run("peak_bytes", flags=flags + more) for more in ([], ["--swap-attention"]))
    shape, setup = shape_of(saved.model("untied")), Setup(layers=((1,),), micro_batch=4, seq_length=32)
    attention = layer_bytes(shape, setup, False) - layer_bytes(
        shape, dataclasses.replace(setup, swapped=("self_attention",)), False
    )
    assert 2.7 * attention <= plain - swapped <= 3 * attention


# Flags -> bytes of a bf16 weight that are on the device no more.
LESS = {"--swap-optimizer": 12, "--reuse-fp32-param": 2}


def test_state_that_is_not_on_the_device_takes_nothing_there(
    npu_worlds: dict[int, World], models: dict[str, str], tokens: str
) -> None:
    flags = ["--seq-length", "32", "--lr", "1e-3", "--train-iters", "2", "--eval-iters", "0", "--bf16"]
    flags += ["--use-distributed-optimizer", "--load", models["untied"], "--data-path", tokens]
    npu_worlds[1].run("held_bytes", flags=flags)  # the first training on a device leaves caches
    plain, weights = npu_worlds[1].run("held_bytes", flags=flags)
    for flag, less in LESS.items():
        held, _ = npu_worlds[1].run("held_bytes", flags=[*flags, flag])
        assert plain - held == pytest.approx(less * weights, rel=0.03), "the allocator rounds each tensor to 512 bytes"
