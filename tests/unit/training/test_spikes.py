"""Leaps are told from noise and trends; what is left out moves the others up and nothing else."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from qwen3_npu import log
from qwen3_npu.args.training import CheckpointArgs
from qwen3_npu.args.watch import SpikeArgs
from qwen3_npu.data.__main__ import main as show
from qwen3_npu.data.train import quarantine
from qwen3_npu.data.train.quarantine import Ordered, Place
from qwen3_npu.errors import UsageError
from qwen3_npu.platform import select_platform
from qwen3_npu.training.spikes.detector import Detector, reason
from qwen3_npu.training.spikes.guard import SpikeGuard
from qwen3_npu.training.spikes.replicas import verdict


def curve(steps: int, seed: int = 0) -> list[tuple[float, float]]:
    """Losses and gradient norms that fall as those of a language model do, with their noise."""
    random = np.random.default_rng(seed)
    at = np.arange(1, steps + 1)
    losses = 2 + 9 * np.exp(-at / 150) + 2 * at**-0.3 + random.normal(0, 0.04, steps)
    norms = (0.4 + 8 * np.exp(-at / 50)) * np.exp(random.normal(0, 0.25, steps))
    return list(zip(losses.tolist(), norms.tolist(), strict=True))


def test_5000_clean_steps_hold_no_spike() -> None:
    detector = Detector(6.0, 2 * math.log(150000))
    for step, (loss, norm) in enumerate(curve(5000), start=1):
        assert reason(loss, norm, detector.limits()) is None, step
        detector.add(step, loss, norm)


@pytest.mark.parametrize("at", [30, 100, 600])
def test_a_leap_is_a_spike_whatever_the_loss_was_long_ago(at: int) -> None:
    detector = Detector(6.0)
    steps = curve(at)
    for step, (loss, norm) in enumerate(steps, start=1):
        detector.add(step, loss, norm)
    loss, norm = np.median(np.array(steps[-8:]), axis=0)
    limits = detector.limits()
    assert reason(loss, norm, limits) is None
    assert "is above" in str(reason(loss + 1.5, norm, limits))
    assert "grad norm" in str(reason(loss, 12 * norm, limits))
    assert reason(math.nan, norm, limits) == f"loss nan, grad norm {norm:g}"
    detector.rewind(at - 20)
    known = Detector(6.0)
    known.restore([(step, *one) for step, one in enumerate(steps, start=1)], at - 20)
    assert detector.limits() == known.limits()


def test_a_loss_that_no_model_can_have_needs_no_history() -> None:
    assert reason(12.0, 1.0, Detector(6.0, 2 * math.log(256)).limits()) is not None


class Letters:
    """26 samples; with epochs, if asked for."""

    def __init__(self, *, repeats: bool) -> None:
        if repeats:
            self.shares = [range(26)]

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        ids = np.full(4, number % 26)
        return {"tokens": ids, "loss_mask": np.ones(4)}

    def locate(self, number: int) -> tuple[str, int]:
        return "letters", number % 26


@pytest.mark.parametrize("repeats", [False, True])
def test_what_is_left_out_moves_the_others_up(repeats: bool, tmp_path: Path) -> None:
    ordered = Ordered(Letters(repeats=repeats))
    whole = list(range(120))
    assert [ordered.raw(n) for n in range(60)] == whole[:60]
    ordered.leave_out([30, 31, 33], 30)  # places 4, 5 and 7, from number 30 on

    def stays(number: int) -> bool:
        return number < 30 or (number % 26 not in (4, 5, 7) if repeats else number not in (30, 31, 33))

    expected = [number for number in whole if stays(number)]
    assert [ordered.raw(n) for n in range(len(expected))] == expected
    assert ordered[30]["tokens"][0] == 32 % 26

    entries = [
        ordered.entry(n, lambda ids: f"{len(ids)} ids", step=4, reason="loss", first=30, action=quarantine.LEFT_OUT)
        for n in (30, 31, 33)
    ]
    quarantine.write(tmp_path, entries)
    assert quarantine.read(tmp_path) == entries
    assert (entries[0].sample, entries[0].excerpt, entries[0].ids) == (4, "4 ids", (4, 4, 4, 4))
    again = Ordered(Letters(repeats=repeats))
    assert again.resolve(entries) == []
    assert [again.raw(n) for n in range(len(expected))] == expected
    moved = Ordered(Letters(repeats=repeats))
    other = [quarantine.Quarantined(**{**vars(entries[0]), "number": 3})]
    assert "is not where it was" in moved.resolve(other)[0]


def test_the_quarantine_is_shown_with_what_is_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = {"tokens": np.arange(5), "loss_mask": np.array([0, 0, 1, 1, 0])}
    ordered = Ordered(Letters(repeats=False))
    fields = {"step": 7, "reason": "loss 9 is above 3", "first": 2, "action": quarantine.LEFT_OUT}
    with mock.patch.object(Letters, "__getitem__", return_value=sample):
        quarantine.write(tmp_path, [ordered.entry(2, **fields)])
    with mock.patch.object(sys, "argv", ["x", "--show-quarantine", str(tmp_path)]):
        show()
    said = capsys.readouterr().out
    assert "step 7, left out: letters, sample 2, token 0; loss 9 is above 3: 5 tokens, 2 learned" in said
    assert "0 1 [[2 3 ]]4" in said


def test_a_damaged_quarantine_is_refused(tmp_path: Path) -> None:
    (tmp_path / quarantine.FILE).write_text('{"key": "a", "step": -1}\n')
    with pytest.raises(UsageError, match=r"quarantine.jsonl, line 1: step is -1; at least 0"):
        quarantine.read(tmp_path)


def test_a_key_is_of_what_is_taught() -> None:
    one = {"tokens": np.arange(4), "loss_mask": np.array([0, 1, 1, 0])}
    other = {"tokens": np.arange(4), "loss_mask": np.array([1, 1, 1, 0])}
    assert quarantine.sample_key(one) == quarantine.sample_key({k: v.copy() for k, v in one.items()})
    assert quarantine.sample_key(one) != quarantine.sample_key(other)
    assert Place("a", 1).offset == 0


def test_the_rank_that_differs_from_the_most_is_named() -> None:
    rows = [(1, 7), (1, 7), (1, 8), (1, 7)]
    assert verdict([4, 5, 6, 7], ["embedding", "norm"], rows).startswith("rank 6 differs in norm from ")
    assert "no majority" in verdict([0, 1], ["w"], [(1,), (2,)])
    assert "w and 1 other tensors" in verdict([0, 1, 2], ["w", "v"], [(1, 1), (2, 2), (1, 1)])


# https://www.hiascend.com: NPU_ASD_CONFIG=enable:<true|false>,with_checksum:<true|false>,...
@pytest.mark.parametrize(
    ("how", "setting"), [("detect", "enable:true"), ("checksum", "enable:true,with_checksum:true")]
)
def test_torch_npus_detection_is_switched_on_by_its_variable(
    how: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPU_ASD_CONFIG", "enable:false")
    with pytest.raises(UsageError, match=f"--npu-asd {how}: torch_npu does this, and the device is no NPU"):
        select_platform("cpu", how)
    assert os.environ["NPU_ASD_CONFIG"] == setting


@pytest.mark.parametrize("rank", [0, 3])
def test_a_spike_is_told_by_the_first_rank_alone(rank: int, capsys: pytest.CaptureFixture) -> None:
    log.setup(rank, 4)
    try:
        guard = SpikeGuard(SpikeArgs(), CheckpointArgs(), ceiling=100.0)
        for step, (loss, norm) in enumerate([*curve(200), (50.0, 90.0)]):
            why = guard.judge(step, loss, norm, skipped=False)
    finally:
        log.setup()
    assert why is not None
    assert capsys.readouterr().out.count("step 200: spike:") == (rank == 0)
