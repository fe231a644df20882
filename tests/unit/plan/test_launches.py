"""The plan's counts of launched operations are those of the simulated NPU's golden table."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from qwen3_npu.plan.setup import Setup
from qwen3_npu.plan.timing import END_LAUNCHES, launches

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "launches_npu.txt"
PLAIN = Setup(layers=((1,),), seq_length=64)
CASES = {
    "dense": (False, {}),
    "packed": (False, {"packed": True}),
    "LoRA": (False, {"lora_rank": 4}),
    "MoE": (True, {}),
    "MoE EP2": (True, {"expert": 2}),
    "MoE EP2 hidden": (True, {"expert": 2}),
    "ring CP2": (False, {"ring": True, "context": 2}),
    "TP2 SP": (False, {"tensor": 2, "sequence_parallel": True}),
    "TP2 MC2": (False, {"tensor": 2, "sequence_parallel": True, "overlap_tensor": True, "fused_tensor": True}),
}


def golden() -> dict[str, tuple[list[int], list[int]]]:
    """Kind of layer -> forward and backward of a layer, and outside of the layers."""
    found = {}
    for line in GOLDEN.read_text().splitlines():
        if not line.startswith("#") and not line.startswith(" "):
            name, layer, ends = line.split("|")
            found[name.strip()] = [int(n) for n in layer.split()[:2]], [int(n) for n in ends.split()[:2]]
    return found


@pytest.mark.parametrize("kind", CASES)
def test_a_layer_launches_what_the_simulated_npu_counted(kind: str) -> None:
    is_moe, flags = CASES[kind]
    counted = golden()[kind][0]
    setup = dataclasses.replace(PLAIN, **flags)
    pieces = 2 if "hidden" in kind else 1
    assert launches(setup, is_moe, pieces=pieces) == sum(counted)
    recomputed = launches(setup, is_moe, 1.0, pieces=pieces)
    assert recomputed == sum(counted) + counted[0], "recomputation runs the forward pass twice"


def test_every_kind_of_layer_is_planned_and_the_ends_are_those_of_a_dense_model() -> None:
    assert set(golden()) - {"decode", "PP2"} == set(CASES)
    assert golden()["PP2"][0] == golden()["dense"][0], "stages exchange outside of the layers"
    assert list(END_LAUNCHES) == golden()["dense"][1]
