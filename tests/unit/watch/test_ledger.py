"""All time is of one kind or another, and the largest avoidable share is named with its flag."""

from __future__ import annotations

import gc
import io
import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from qwen3_npu import cli
from qwen3_npu.args.pretrain import GROUPS, PretrainArgs
from qwen3_npu.errors import UsageError
from qwen3_npu.ledger.__main__ import main
from qwen3_npu.ledger.gains import gains
from qwen3_npu.ledger.picture import heat, png, stacked_columns
from qwen3_npu.ledger.records import read
from qwen3_npu.ledger.why import causes, explained, why
from qwen3_npu.plan.verdict import PlanVerdict
from qwen3_npu.training.prepare.plan import plan_training
from qwen3_npu.training.reports.ledger import by_device
from qwen3_npu.watch import here
from qwen3_npu.watch.times import KINDS, Times

FACTS = {"ranks": 2, "pipeline": 1, "virtual": 1, "micro_batches": 4, "micro_tokens": 8192, "layers": 4}
FACTS |= {"recompute": "none", "padding": 0.0, "imbalance": None, "async_save": False, "manual_gc": False}


def test_every_second_is_of_one_kind() -> None:
    times, clock, processor = Times(), [100.0], [7.0]
    clocks = {"monotonic": lambda: clock[0], "thread_time": lambda: processor[0]}
    with mock.patch.multiple(time, **clocks):
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
            with here.during("report"):
                clock[0] += 16
            clock[0] += 32  # between steps, and of it 12 on a processor
            processor[0] += 12
            here.at("data")
        finally:
            gc.callbacks.remove(times.collects)
            here.watch()
        found = dict(zip([*KINDS, "wall"], times.take(), strict=False))
    told = {kind: value for kind, value in found.items() if value}
    expected = {"data": 1, "forward": 1.25, "wait tp": 0.5, "wait other groups": 0.25, "save": 8}
    assert told == {**expected, "report": 16, "other": 12, "pause": 20, "wall": 59}
    times.collects("start", {})
    times.collecting -= 3
    times.collects("stop", {})
    assert dict(zip(KINDS, times.take(), strict=False))["garbage"] == pytest.approx(3, abs=0.1)


class Stream:
    """A device that does its work in order; the host's clock runs by itself."""

    def __init__(self) -> None:
        self.host, self.free = 100.0, 100.0

    def work(self, seconds: float, launch: float = 0.0) -> None:
        self.host += launch
        self.free = max(self.free, self.host) + seconds

    def event(self) -> Event:
        return Event(self)


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.at = stream, 0.0

    def record(self) -> None:
        self.at = self.stream.free = max(self.stream.free, self.stream.host)

    def query(self) -> bool:
        return self.stream.host >= self.at

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1000


def test_a_devices_time_is_that_of_its_events_and_is_read_when_they_are_over() -> None:
    stream = Stream()
    with mock.patch.object(time, "monotonic", side_effect=lambda: stream.host):
        times = Times(stream.event)
        here.watch(times)
        try:
            for _ in range(2):  # the second time with the same events
                times.next_step()
                here.at("data")
                stream.host += 1  # reads, while the device has nothing to do
                here.at("forward")
                stream.work(4, launch=0.5)
                here.at("backward")  # of the first half the host is ahead
                stream.work(7, launch=0.5)
                times.begin_wait("dp")
                stream.work(2)  # another stream, which this one waits for
                times.wait("dp", 0.0)
                here.at("optimizer")
                stream.work(1)
                here.step_done(1)
                assert not any(times.take()[len(KINDS) + 1 :]), "not done yet: nothing waits for it"
                stream.host = stream.free
                found = dict(zip(KINDS, times.take()[len(KINDS) + 1 :], strict=True))
                told = {kind: pytest.approx(s) for kind, s in found.items() if s}
                assert told == {"data": 1, "forward": 4.5, "backward": 7, "wait dp": 2, "optimizer": 1}
            times.next_step()
            here.at("forward")
            for _ in range(3):
                stream.work(0.1, launch=1)  # the device waits for the host's launches
            here.step_done(2)
            stream.host = stream.free
            found = dict(zip(KINDS, times.take()[len(KINDS) + 1 :], strict=True))
            assert {kind: s for kind, s in found.items() if s} == {"host": pytest.approx(3.1)}
        finally:
            here.watch()


def test_a_record_divides_steps_as_the_device_has_noted() -> None:
    def row(host: dict[str, float], noted: dict[str, float]) -> list[float]:
        return [*(host.get(k, 0.0) for k in KINDS), sum(host.values()), *(noted.get(k, 0.0) for k in KINDS)]

    host = {"data": 1.0, "forward": 1.0, "optimizer": 8.0, "save": 5.0, "garbage": 1.0}
    noted = {"forward": 0.1, "backward": 0.2, "host": 0.1, "wait dp": 0.1}
    found, said = by_device(torch.tensor([row(host, noted), row(host, {})]))
    first, second = (dict(zip([*KINDS, "wall"], line, strict=True)) for line in found.tolist())
    expected = {"forward": 2, "backward": 4, "host": 2, "wait dp": 2, "save": 5, "garbage": 1, "wall": 16}
    assert {kind: value for kind, value in first.items() if value} == pytest.approx(expected)
    assert {kind: value for kind, value in second.items() if value} == pytest.approx(host | {"wall": 16})
    assert dict(zip(KINDS, said, strict=True))["optimizer"] == 8
    assert by_device(torch.tensor([row(host, {})]))[1] == []


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
    "report": (BASE | {"report": 0.3}, {}, {}, "report", 0.3 / 1.27),
    "check": (BASE | {"check": 0.3}, {}, {}, "check", 0.3 / 1.27),
    # 4 layers x 120 launches x 128 micro-batches x 6 us are 0.37 s; half of that could be saved.
    "tiny": (BASE, {}, {"micro_tokens": 128, "micro_batches": 128}, "tiny kernels", 0.3686 / 0.97 / 2),
}


@pytest.mark.parametrize("name", CASES)
def test_the_largest_avoidable_share_is_named(name: str, tmp_path: Path) -> None:
    mean, most, facts, expected, share = CASES[name]
    found = causes(read(records(tmp_path, mean, most, **facts)))[0]
    assert (found.name, found.share) == (expected, pytest.approx(share, abs=0.02))
    assert ("--" in found.text) or "rank 1" in found.text


# Flags of a training of 16 devices, the cause, and the flags that take the place of the words.
PLANNED = {
    "larger batches": ("--model qwen3-8b --pipeline-model-parallel-size 4 --global-batch-size 16", "few micro-batches"),
    "smaller tp": ("--model qwen3-8b --tensor-model-parallel-size 8 --sequence-parallel", "wait tp"),
    "overlap": ("--model qwen3-1.7b --use-distributed-optimizer", "wait dp"),
    "gather": ("--model qwen3-1.7b --use-distributed-optimizer --overlap-grad-reduce", "wait dp"),
    "experts": ("--model qwen3-30b-a3b --expert-model-parallel-size 16 --use-distributed-optimizer", "wait ep"),
    "recompute": (
        "--model qwen3-1.7b --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "recompute",
    ),
    "rows": ("--model qwen3-0.6b --seq-length 512 --global-batch-size 64", "tiny kernels"),
}


@pytest.mark.parametrize("name", PLANNED)
def test_what_a_flag_would_bring_is_what_the_plan_says_of_a_training_with_it(name: str, tmp_path: Path) -> None:
    flags, cause = PLANNED[name]
    before = planned_verdict(flags)
    words, share = gains(before)[cause]
    flag = words.partition(" (which needs ")[0]
    if flag.startswith("twice the "):
        option = flag.removeprefix("twice the ")
        sizes = {"--global-batch-size": before.setup.global_batch, "--micro-batch-size": before.setup.micro_batch}
        flag = f"{option} {2 * sizes[option]}"
    given = flags.partition(" --recompute")[0] if flag.startswith("no --recompute") else f"{flags} {flag}"
    after = planned_verdict(given)
    tokens = after.setup.global_batch / before.setup.global_batch
    # The parser pads the vocabulary for the new size of tensor parallelism: 512 of 152,576 rows.
    near = 1e-5 if name == "smaller tp" else 1e-9
    assert share == pytest.approx(max(1 - after.time.total / tokens / before.time.total, 0), abs=near), words
    assert ("which needs" in words) == (not after.fits)
    mean = BASE | {"wait tp": 3.0}
    said = why(read(records(tmp_path, mean, planned={"wait tp": [words, share]})))
    assert said.endswith(f"; the plan expects {100 * share:.0f} % less time a token of {words}")


def planned_verdict(flags: str) -> PlanVerdict:
    """As the training's own parser and checks understand the flags."""
    common = "--data-path x --train-iters 1 --dry-run --lr 1e-5 --bf16 --from-scratch --seq-length 4096"
    words = [*common.split(), "--global-batch-size", "64", *flags.split()]
    args = PretrainArgs(*cli.parse("p", "d", GROUPS, {}, argv=words).groups)
    verdict = plan_training(args, 16).verdict
    assert verdict is not None
    return verdict


@pytest.mark.parametrize("pair", [[], ["x"], ["--x", "much"], [1, 0.5], 3])
def test_a_damaged_record_is_named(pair: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"line 2: ledger: data"):
        read(records(tmp_path, BASE, planned={"data": pair}))


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
    pixels = stacked_columns([{"a": 1.0}, {"a": 0.5, "b": 0.5}], ["a", "b"])
    assert (np.array(Image.open(io.BytesIO(png(pixels)))) == pixels).all()
    assert (heat([1.0, 1.0, 2.0])[0, [0, 32]] == [[255, 255, 255], [255, 0, 0]]).all()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    with pytest.raises(UsageError, match="holds no record of a ledger"):
        read(tmp_path)


def test_recordings_are_handed_to_msprof_analyze(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its documentation one rank's recording is given itself, those of several ranks by the folder above."""
    records(tmp_path, BASE)
    program = tmp_path / "bin" / "msprof-analyze"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\ntest ! -e {tmp_path}/fails\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    folder = tmp_path / "profile"
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path), "--profile-path", str(folder)])
    with pytest.raises(UsageError, match=r"holds no recording of an NPU \(\*_ascend_pt\)"):
        main()
    for rank in (1, 2):
        (folder / f"host_{rank}_20261127_ascend_pt").mkdir(parents=True)
        main()
    (tmp_path / "fails").touch()
    with pytest.raises(UsageError, match="msprof-analyze ended with status 1"):
        main()
    several = f"advisor all -d {folder} -o {tmp_path} -l en"
    one = several.replace(str(folder), f"{folder}/host_1_20261127_ascend_pt")
    assert (tmp_path / "called").read_text().splitlines() == [one, several, several]
