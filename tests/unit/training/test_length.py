"""Steps, samples and epochs: one length said in three ways, and what the start says of it."""

from __future__ import annotations

import pytest

from qwen3_npu import cli
from qwen3_npu.args.pretrain import GROUPS, PretrainArgs
from qwen3_npu.data.train.data_path import DataFacts
from qwen3_npu.errors import UsageError
from qwen3_npu.training.prepare import length


def args(*flags: str) -> PretrainArgs:
    return PretrainArgs(*cli.parse("x", "", GROUPS, {}, argv=["--data-path", "x", "--lr", "1", *flags]).groups)


def steps(*flags: str, batch: int = 8, epoch: int | None = 200) -> int:
    return length.settled(args(*flags), batch, epoch).train.steps


def test_one_length_in_three_ways() -> None:
    assert steps("--train-iters", "7") == 7
    assert steps("--train-samples", "63") == 7, "whole steps, as Megatron counts"
    assert steps("--epochs", "3") == 75
    assert steps("--epochs", "1", batch=7) == 29, "the last step is filled up"
    assert steps("--epochs", "0.5") == 13
    assert length.settled(args("--epochs", "3"), 8, None).train.epochs == 3, "raw data in a dry run"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "how long is the training.*exactly one of --train-iters, --train-samples, --epochs"),
        (("--train-iters", "5", "--epochs", "2"), "--train-iters 5 and --epochs 2.0: give exactly one"),
        (("--train-samples", "7"), "--train-samples 7 is less than one step of 8 samples"),
        (("--train-samples", "80", "--lr-decay-iters", "5"), "not go with --train-samples; give --lr-decay-samples"),
        (("--train-samples", "80", "--lr-warmup-iters", "5"), "--lr-warmup-iters does not go with --train-samples"),
        (("--train-iters", "5", "--lr-warmup-samples", "5"), "--lr-warmup-samples .*give --lr-warmup-iters"),
        (("--epochs", "5", "--lr-decay-samples", "5"), "--lr-decay-samples does not go with .*give --lr-decay-iters"),
        (("--train-samples", "80", "--lr-warmup-samples", "5", "--lr-warmup-fraction", "0.1"), "say the same thing"),
    ],
)
def test_what_does_not_go_together(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        steps(*flags)


def rates(*flags: str) -> list[float]:
    import torch

    from qwen3_npu.training.optimizer import build_scheduler

    made = length.settled(args("--min-lr", "0.1", *flags), 8, 200)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(optimizer, made.optimizer, made.train, 8)  # type: ignore[arg-type]
    found = []
    for _ in range(made.train.steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        scheduler.step(increment=8)
    return found


def test_a_schedule_by_samples_is_the_one_by_steps() -> None:
    by_steps = rates("--train-iters", "20", "--lr-warmup-iters", "5", "--lr-decay-iters", "15")
    assert len(set(by_steps)) > 10
    assert rates("--train-samples", "167", "--lr-warmup-samples", "40", "--lr-decay-samples", "120") == by_steps
    # By hand: linear from 1 to 0.1 over 160 samples.
    assert rates("--train-samples", "160")[10] == pytest.approx(1 - 0.9 * 80 / 160)
    assert rates("--epochs", "0.8")[10] == pytest.approx(1 - 0.9 * 80 / 160)


def test_the_start_says_epochs_and_what_is_cut() -> None:
    facts = DataFacts(200, truncated=3, truncated_tokens=1234)
    lines = length.describe_length(args("--train-iters", "1000", "--seq-length", "64"), 1000, 8, facts)
    assert lines[0] == "data: 200 samples for training, 25 steps per epoch; 1000 steps make 40 epochs"
    assert lines[1] == "data: 3 of 200 samples are longer than --seq-length 64: 1.23 ktokens are truncated"
    assert lines[2].startswith("warning: 200 samples x 1000 steps of 8 = 40 epochs; --epochs N")
    assert len(length.describe_length(args("--epochs", "40"), 1000, 8, facts)) == 2, "it was asked for"
    assert len(length.describe_length(args("--train-iters", "30"), 30, 8, DataFacts(200))) == 1
