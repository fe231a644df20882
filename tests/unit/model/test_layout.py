"""Which layers, experts and rows live where."""

from __future__ import annotations

import pytest

from qwen3_npu.distributed.layout import NOOP, check_world_size, plan
from qwen3_npu.errors import UsageError
from qwen3_npu.model.sizes import SIZES

DENSE, MOE, LARGE = SIZES["qwen3-14b"], SIZES["qwen3-30b-a3b"], SIZES["qwen3-235b-a22b"]


def test_plain_pipeline() -> None:
    layout = plan(DENSE, tensor=2, pipeline=4)
    assert [stage[0][0] for stage in layout.chunks] == [0, 10, 20, 30]
    assert [layout.folder(r) for r in layout.ranks()][:3] == ["mp_rank_00_000", "mp_rank_01_000", "mp_rank_00_001"]
    assert str(layout) == "TP2 PP4"


def test_virtual_stages_interleave() -> None:
    layout = plan(DENSE, pipeline=2, layers_per_virtual_stage=10)
    assert layout.virtual == 2
    assert [chunk[0] for stage in layout.chunks for chunk in stage] == [0, 20, 10, 30]


def test_noop_places_keep_their_local_number() -> None:
    layout = plan(LARGE, pipeline=4, layers_per_virtual_stage=8, noop_layers=[94, 95], expert=32, tensor=4)
    assert layout.num_layers == 96
    assert layout.noop_layers == [94, 95]
    assert layout.chunks[3][2][-2:] == (NOOP, NOOP)
    shifted = plan(LARGE, pipeline=4, noop_layers=[0, 95])
    assert shifted.chunks[0][0][:3] == (NOOP, 0, 1)
    assert shifted.noop_layers == [0, 95]


def test_uneven_pipeline() -> None:
    layout = plan(DENSE, pipeline=4, num_layer_list=[9, 11, 11, 9])
    assert [len(stage[0]) for stage in layout.chunks] == [9, 11, 11, 9]
    assert layout.chunks[3][0][-1] == 39


@pytest.mark.parametrize(
    ("sizes", "folders"),
    [
        ({"tensor": 2, "expert": 2}, ["00_000", "00_001", "01_000", "01_001"]),
        ({"tensor": 2, "expert": 2, "expert_tensor": 1}, ["00_000", "01_001"]),
        ({"tensor": 4, "expert": 2, "expert_tensor": 1}, ["00_000", "01_001", "02_000", "03_001"]),
        ({"tensor": 2, "expert": 4, "expert_tensor": 1}, ["00_000", "00_002", "01_001", "01_003"]),
        ({"tensor": 4, "expert": 2, "expert_tensor": 2}, ["00_000", "01_000", "02_001", "03_001"]),
    ],
)
def test_expert_ranks_that_exist(sizes: dict, folders: list[str]) -> None:
    layout = plan(MOE, **sizes)
    assert [layout.folder(rank) for rank in layout.ranks()] == [f"mp_rank_{f}" for f in folders]


def test_vocabulary_padding() -> None:
    assert plan(DENSE, tensor=8).padded_vocab_size == 151936
    assert plan(DENSE, tensor=2, vocab_divisible_by=1000).padded_vocab_size == 152000
    assert plan(DENSE, tensor=2, padded_vocab_size=152064).padded_vocab_size == 152064


@pytest.mark.parametrize(
    ("arch", "sizes", "message"),
    [
        (DENSE, {"tensor": 16}, "does not divide the 8 KV heads; use one of 1, 2, 4, 8"),
        (MOE, {"tensor": 12}, "does not divide the 4 KV heads; use one of 1, 2, 4, 8, 16, 32"),
        (DENSE, {"pipeline": 7}, "does not divide the 40 layers"),
        (DENSE, {"pipeline": 4, "layers_per_virtual_stage": 3}, "does not divide the 10 layers of a pipeline stage"),
        (DENSE, {"pipeline": 2, "num_layer_list": [20, 21]}, "add up to the model's 40 layers"),
        (DENSE, {"pipeline": 2, "num_layer_list": [40, 0]}, "must have 2 entries .*, each 1 or more"),
        (DENSE, {"noop_layers": [77]}, "distinct numbers from 0 to 40"),
        (DENSE, {"expert": 2}, "needs a MoE model"),
        (MOE, {"expert": 3}, "does not divide the 128 experts"),
        (MOE, {"tensor": 2, "expert_tensor": 4}, "expert tensor parallel size 4 does not divide the tensor"),
        (DENSE, {"padded_vocab_size": 1000}, "smaller than the model's vocabulary"),
        (DENSE, {"tensor": 2, "padded_vocab_size": 151937}, "not a multiple of the tensor parallel size"),
    ],
)
def test_what_does_not_fit(arch: object, sizes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(arch, **sizes)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(UsageError, match=r"(?s)KV heads.*layers"):
        plan(DENSE, tensor=16, pipeline=7)


def test_world_size() -> None:
    layout = plan(MOE, tensor=2, pipeline=2, expert=4)
    check_world_size(layout, 16)
    with pytest.raises(UsageError, match="6 processes cannot hold copies of TP 2 x PP 2: start a multiple of 4"):
        check_world_size(layout, 6)
    with pytest.raises(UsageError, match="EP 4 x ETP 2 x PP 2: start a multiple of 16"):
        check_world_size(layout, 8)
