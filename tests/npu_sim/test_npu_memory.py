"""What the plan says that a layer keeps on an NPU, against torch_npu's own autograd."""

from __future__ import annotations

import pytest

import saved
from qwen3_npu.plan.activations import NPU, layer_bytes
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
