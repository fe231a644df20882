"""All time is of one kind or another, and the largest avoidable share is named with its flag."""

from __future__ import annotations

import gc
import io
import json
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from qwen3_npu.errors import UsageError
from qwen3_npu.ledger.__main__ import main
from qwen3_npu.ledger.picture import heat, png, stacked
from qwen3_npu.ledger.records import read
from qwen3_npu.ledger.why import causes, explained
from qwen3_npu.watch import here
from qwen3_npu.watch.times import KINDS, Times

FACTS = {"ranks": 2, "pipeline": 1, "virtual": 1, "micro_batches": 4, "micro_tokens": 8192, "layers": 4}
FACTS |= {"recompute": "none", "padding": 0.0, "imbalance": None, "async_save": False, "manual_gc": False}


def test_every_second_is_of_one_kind() -> None:
    times, clock = Times(), [100.0]
    with mock.patch.object(time, "monotonic", side_effect=lambda: clock[0]):
        times.take()
        here.watch(times)
        gc.callbacks.append(times.collects)
        try:
            here.at("data")
            clock[0] += 1
            here.at("forward")
            clock[0] += 2
            times.wait("tp", 0.5)
            times.wait("of ranks 0, 1", 0.25)
            with here.during("save"):
                clock[0] += 4
                here.at("forward")  # of an evaluation inside: still saving
                clock[0] += 4
            here.step_done(1)
        finally:
            gc.callbacks.remove(times.collects)
            here.watch()
        found = dict(zip([*KINDS, "wall"], times.take(), strict=True))
    told = {kind: value for kind, value in found.items() if value}
    assert told == {"data": 1, "forward": 1.25, "wait tp": 0.5, "wait other groups": 0.25, "save": 8, "wall": 11}
    times.collects("start", {})
    times.collecting -= 3
    times.collects("stop", {})
    assert dict(zip(KINDS, times.take(), strict=False))["garbage"] == pytest.approx(3, abs=0.1)


def records(folder: Path, mean: dict[str, float], most: dict[str, list] | None = None, **facts: object) -> Path:
    entry = {"steps": 10, "seconds": sum(mean.values()), "mean": mean, **FACTS, **facts}
    entry["most"] = {kind: [value, 0] for kind, value in mean.items()} | (most or {})
    lines = [{"step": 5, "loss": 1.0}, {"step": 10, "ledger": entry}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


BASE = {"data": 0.01, "forward": 0.3, "backward": 0.6, "optimizer": 0.05, "other": 0.01}
CASES = {
    "data": (BASE | {"data": 0.4}, {}, {}, "data", 0.4 / 1.36),
    "one slow rank": (BASE | {"data": 0.2}, {"data": [0.39, 1]}, {}, "slow rank in data", 0.38 / 1.16),
    "save": (BASE | {"save": 0.5}, {}, {}, "save", 0.5 / 1.47),
    "tp": (BASE | {"wait tp": 0.5}, {}, {}, "wait tp", 0.5 / 1.47),
    "bubble": (BASE | {"wait pp": 0.6}, {}, {"pipeline": 4, "micro_batches": 4}, "few micro-batches", 0.6 / 1.57),
    "uneven": (BASE | {"wait pp": 0.6}, {}, {"pipeline": 2, "micro_batches": 64}, "uneven stages", 0.3667),
    "padding": (BASE, {}, {"padding": 0.5}, "padding", 0.5 * 0.9 / 0.97),
    "imbalance": (BASE, {}, {"imbalance": 3.0}, "imbalance", 2 / 3 * 0.9 / 0.97 / 2),
    "recompute": (BASE, {}, {"recompute": "full"}, "recompute", 0.9 / 0.97 / 4),
    "garbage": (BASE | {"garbage": 0.3}, {}, {}, "garbage", 0.3 / 1.27),
    # 4 layers x 120 launches x 128 micro-batches x 6 us are 0.37 s; half of that could be saved.
    "tiny": (BASE, {}, {"micro_tokens": 128, "micro_batches": 128}, "tiny kernels", 0.3686 / 0.97 / 2),
}


@pytest.mark.parametrize("name", CASES)
def test_the_largest_avoidable_share_is_named(name: str, tmp_path: Path) -> None:
    mean, most, facts, expected, share = CASES[name]
    found = causes(read(records(tmp_path, mean, most, **facts)))[0]
    assert (found.name, found.share) == (expected, pytest.approx(share, abs=0.02))
    assert ("--" in found.text) or "rank 1" in found.text


def test_the_command_prints_a_table_a_picture_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    records(tmp_path, BASE | {"save": 0.5})
    with mock.patch.object(sys, "argv", ["x", str(tmp_path)]):
        main()
    said = capsys.readouterr().out
    assert "backward" in said
    assert "why slow: 34 % of the time: checkpoints: --async-save" in said
    assert "explained: 99.3 %" in said
    assert explained(read(tmp_path)) == pytest.approx(1 - 0.01 / 1.47)
    picture = np.array(Image.open(tmp_path / "ledger.png"))
    assert (picture[-1, 0] == [57, 106, 177]).all(), "backward, the largest, is below, in blue"
    pixels = stacked([{"a": 1.0}, {"a": 0.5, "b": 0.5}], ["a", "b"])
    assert (np.array(Image.open(io.BytesIO(png(pixels)))) == pixels).all()
    assert (heat([1.0, 1.0, 2.0])[0, [0, 32]] == [[255, 255, 255], [255, 0, 0]]).all()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    with pytest.raises(UsageError, match="holds no record of a ledger"):
        read(tmp_path)
