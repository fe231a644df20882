"""Micro-batches of a rank: what each pipeline stage gets, when, and by how many copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3_npu.data.train.pretrain_dataset import batched, plain_rows
from qwen3_npu.data.train.rows import Rows, pretraining_rows
from qwen3_npu.training import feed


class Copies(TorchDispatchMode):
    """Counts transfers to a device; the meta device stands for one."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        inputs = [a.device.type for a in args if isinstance(a, torch.Tensor)]
        is_made_there = isinstance(out, torch.Tensor) and out.device.type == "meta"
        self.count += is_made_there and "meta" not in inputs[:1]
        return out


def feed_of(
    samples: list, make_rows: Callable, *, stage: int, stages: int, monkeypatch: pytest.MonkeyPatch
) -> feed.Feed:
    """A feed on one pipeline stage of one data-parallel rank: two micro-batches of two samples a step, two steps."""
    state = SimpleNamespace(
        get_data_parallel_rank=lambda: 0,
        get_context_parallel_rank=lambda: 0,
        is_pipeline_first_stage=lambda: stage == 0,
        is_pipeline_last_stage=lambda: stage == stages - 1,
    )
    monkeypatch.setattr(feed, "parallel_state", state)
    parallel = SimpleNamespace(context_parallel_algo="ulysses_cp_algo", context_parallel_size=1)
    args: Any = SimpleNamespace(parallel=parallel, train=SimpleNamespace(micro_batch_size=2, steps=2))
    arch = SimpleNamespace(is_moe=True, rope=None)
    plan: Any = SimpleNamespace(global_batch=4, data_parallel=1, arch=arch)
    return feed.Feed(args, plan, samples, None, make_rows=make_rows, rows=2, length=None)


def text_samples(count: int) -> list[dict[str, torch.Tensor]]:
    shared = {"labels": torch.tensor([9, 2, 9]), "loss_mask": torch.ones(3)}
    return [{"tokens": torch.tensor([n, 9, 2]), **shared} for n in range(count)]


def test_batches_know_their_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}

    def rows(samples: list[dict[str, torch.Tensor]]) -> Rows:
        return pretraining_rows(*batched(samples), eod=9, **how)

    fed = feed_of(text_samples(8), rows, stage=0, stages=1, monkeypatch=monkeypatch)
    made = list(fed.batches(fed.train, 0, torch.device("cpu"), torch.float32))
    assert [batch.tokens.tolist() for batch in made] == [[[0, 9, 2, 1, 9, 2]], [[2, 9, 2, 3, 9, 2]]]
    for batch in made:
        assert (batch.sequence.positions.tolist(), batch.sequence.cu_seqlens) == ([[0, 1, 0, 0, 1, 0]], (0, 2, 3, 5, 6))
        assert (batch.labels.tolist(), batch.loss_mask.tolist()) == ([[9, 2, 9] * 2], [[1, 0, 1, 1, 0, 1]])
        assert batch.amounts.tolist() == [6, 6, 2 * (2 * 2 + 1)]  # tokens, places, squared lengths of documents
        assert batch.supervised == 4


@pytest.mark.parametrize(
    ("stage", "fields"),
    [
        (0, {"tokens", "positions", "padding"}),
        (1, {"positions", "padding"}),
        (2, {"labels", "loss_mask", "amounts", "positions", "padding"}),
    ],
    ids=["first stage", "middle stage", "last stage"],
)
def test_a_micro_batch_is_one_copy_of_what_the_stage_needs(
    stage: int, fields: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def rows(samples: list) -> Any:
        read.extend(int(sample["tokens"][0]) for sample in samples)
        made = plain_rows(samples)
        return dataclasses.replace(made, padding=np.zeros(made.tokens.shape, bool))

    fed = feed_of(text_samples(8), rows, stage=stage, stages=3, monkeypatch=monkeypatch)
    with Copies() as copies:
        step = fed.batches(fed.train, 0, torch.device("meta"), torch.float32)
        first = next(step)
        assert read == [0, 1, 2, 3], "the second micro-batch is under way while the first is computed"
        assert copies.count == 2
        list(step)
        assert read == [0, 1, 2, 3, 4, 5], "and the next step's first with the last"
        list(fed.batches(fed.train, 4, torch.device("meta"), torch.float32))
        assert read == list(range(8)), "each sample is read once, and none after the last step"
        assert copies.count == 4
    found = {**vars(first), **vars(first.sequence)}
    assert {name for name, value in found.items() if isinstance(value, torch.Tensor)} == fields
