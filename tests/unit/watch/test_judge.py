"""Verdicts on states made by hand, limits of patience, and stragglers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import threading
import time
from pathlib import Path

import pytest

from qwen3_npu import processes
from qwen3_npu.watch import flight, probe
from qwen3_npu.watch.judge import Channel, Entry, RankReport, judge_hang
from qwen3_npu.watch.settings import Settings
from qwen3_npu.watch.state import INSIDE, LAUNCHED, LEFT, PHASES, CollectiveCall, RankSnapshot, State, read
from qwen3_npu.watch.stragglers import Stragglers
from qwen3_npu.watch.watcher import Watcher, first_dead, limit

RANK = RankReport(
    rank=0,
    node="a",
    device=0,
    pid=1,
    alive=True,
    state="S",
    waits_in="",
    computes=False,
    ended=False,
    steps=3,
    phase="forward",
    age=9.0,
    at="x.py:1 (f)",
    inner="",
    channels={},
)
EVERYONE = (0, 1, 2, 3)


def call(number: int, state: int = INSIDE, name: str = "all_reduce", shape: tuple[int, ...] | None = (4,)) -> Entry:
    return Entry(number, name, "float32", shape, state=state, age=9.0)


def ranks(*channels: dict[str, Entry], members: tuple[int, ...] = EVERYONE) -> list[RankReport]:
    """A rank for each: channel -> its last call."""
    made = []
    for number, own in enumerate(channels):
        known = {name: Channel(name, members, entry) for name, entry in own.items()}
        made.append(dataclasses.replace(RANK, rank=number, device=number, channels=known))
    return made


@pytest.mark.parametrize("state", [INSIDE, LAUNCHED])
def test_the_rank_that_has_not_called_is_named_on_hosts_and_devices(state: int) -> None:
    verdict = judge_hang(ranks(*[{"dp": call(7, state)}] * 3, {"dp": call(6, LEFT)}))
    assert (verdict.kind, verdict.ranks) == ("elsewhere", (3,))
    assert "rank 3 (a, device 3) never entered all_reduce #7 of group dp (4 ranks; 3 wait since 9 s)" in verdict.text


def test_a_chain_of_waits_ends_at_its_first_cause() -> None:
    # 0 waits for 1 and 2 in tp, 1 waits for the others in pp, and 2 is in Python.
    chain = [
        {"tp": call(5)},
        {"tp": call(4, LEFT), "pp": call(2)},
        {"tp": call(4, LEFT)},
        {"tp": call(5), "pp": call(2)},
    ]
    verdict = judge_hang(ranks(*chain))
    assert verdict.ranks == (2,)
    assert verdict.text.startswith("rank 2 (a, device 2) never entered all_reduce #5 of group tp")


def test_a_call_that_was_only_begun_holds_nobody_up() -> None:
    # 2 has begun a reduction of dp that 0 has not, and is in Python. 3 waits for it in tp, 1 for 3 in dp, 0 for 1.
    made = ranks({"tp 0": call(5)}, {"dp 1": call(5), "tp 0": call(4, LEFT)}, {"dp 0": call(5)}, {"tp 1": call(5)})
    members = {"tp 0": (0, 1), "tp 1": (2, 3), "dp 0": (0, 2), "dp 1": (1, 3)}
    states = [
        dataclasses.replace(
            one,
            channels={name: Channel(name, members[name], channel.last) for name, channel in one.channels.items()},
            waits=one.rank != 2,
        )
        for one in made
    ]
    verdict = judge_hang(states)
    assert (verdict.kind, verdict.ranks) == ("elsewhere", (2,))
    assert verdict.text.startswith("rank 2 (a, device 2) never entered all_reduce #5 of group tp 1 (2 ranks; 1 waits")


def test_all_culprits_are_named() -> None:
    states = ranks({"dp": call(7)}, {"dp": call(6, LEFT)}, {"dp": call(7)}, {"dp": call(6, LEFT)})
    assert judge_hang(states).ranks == (1, 3)
    states[1] = dataclasses.replace(states[1], state="T")
    verdict = judge_hang(states)
    assert (verdict.kind, verdict.ranks) == ("stopped", (1, 3))
    assert "rank 1 (a, device 1) does not run" in verdict.text
    assert "; rank 3 (a, device 3) never entered all_reduce #7" in verdict.text
    other = ranks(*[{"dp": call(7, shape=shape)} for shape in ((5,), (4,), (4,), (6,), (4,))], members=tuple(range(5)))
    assert judge_hang(other).ranks == (0, 3)
    assert "rank 0 (a, device 0) gives float32 [5], rank 3 (a, device 3) gives float32 [6], and 3 others" in str(
        judge_hang(other).text
    )


def test_of_several_mismatches_the_oldest_is_told() -> None:
    late, early = (call(7, shape=(5,)), call(7)), (call(3, name="barrier"), call(3))
    states = ranks(*({"a": a, "z": dataclasses.replace(z, age=99.0)} for a, z in zip(late, early, strict=True)))
    verdict = judge_hang(states)
    assert verdict.kind == "order"
    assert "order mismatch at call #3 of group z: rank" in verdict.text


def test_how_numbers_are_reduced_is_compared() -> None:
    states = ranks({"dp": call(7, name="all_reduce(max)")}, {"dp": call(7)}, {"dp": call(7)})
    verdict = judge_hang(states)
    assert (verdict.kind, verdict.ranks) == ("shape", (0,))
    assert "mismatch in all_reduce #7 of group dp: rank 0 (a, device 0) gives float32 [4] for max, and 2 others" in (
        verdict.text
    )


def test_who_has_left_a_call_waits_for_nobody() -> None:
    verdict = judge_hang(ranks({"dp": call(7, LEFT)}, {"dp": call(6, LEFT)}))
    assert verdict.kind == "alone"


def test_another_view_of_the_same_numbers_is_no_mismatch_and_another_count_is() -> None:
    same = ranks({"dp": call(7, shape=(2, 2))}, {"dp": call(7)}, {"dp": call(7)}, {"dp": call(7)})
    assert judge_hang(same).kind == "network"
    other = ranks({"dp": call(7, shape=(2, 3))}, {"dp": call(7)}, {"dp": call(7)}, {"dp": call(7)})
    assert (judge_hang(other).kind, judge_hang(other).ranks) == ("shape", (0,))


def test_a_mismatch_is_the_cause_of_a_death() -> None:
    states = ranks({"dp": call(7, shape=(5,))}, {"dp": call(7)}, {"dp": call(7)})
    states[1] = dataclasses.replace(states[1], alive=False)
    assert judge_hang(states).kind == "shape"
    states[0] = dataclasses.replace(states[1], rank=0)
    assert (judge_hang(states).kind, judge_hang(states).ranks) == ("dead", (0, 1))


def test_a_send_and_its_receive_agree() -> None:
    states = ranks({"dp 0>1": call(3, name="send")}, {"dp 0>1": call(3, name="recv")}, members=(0, 1))
    assert judge_hang(states).kind == "network"


def test_a_node_without_a_report_is_named_first() -> None:
    assert judge_hang(ranks({"dp": call(7)}), ["node 1 of 2"]).kind == "missing"


def test_the_patience_follows_the_steps_and_their_phase() -> None:
    step = RankSnapshot(1, 9, "forward", 0.0, ended=False, durations=[20.0] * 5, windows={}, last={}, recent=[])
    assert limit(None, {0: step}) == 200
    assert limit(None, {0: dataclasses.replace(step, durations=[0.1] * 9)}) == 60
    assert limit(7, {0: step}) == 7
    for phase in ("save", "eval", "start"):
        assert limit(7, {0: step, 1: dataclasses.replace(step, phase=phase)}) == 600
    assert limit(90, {0: dataclasses.replace(step, durations=[])}) == 900, "the first step"


def test_of_several_dead_ranks_the_one_outside_of_collectives_is_named() -> None:
    def read(state: int, *, ended: bool = False) -> RankSnapshot:
        last = {0: CollectiveCall(9, 0, 0, 0, state=state, shape=None, entered=1.0, left=0.0)}
        return RankSnapshot(1, 9, "data", 0.0, ended=ended, durations=[], windows={}, last=last, recent=[])

    states = {0: read(LEFT, ended=True), 1: read(INSIDE), 2: read(LEFT), 3: read(INSIDE)}
    assert first_dead({1, 2, 3}, states) == {2}
    assert first_dead({1, 3}, states) == {1, 3}
    states[0] = read(LEFT)
    assert first_dead({1, 2, 3}, states) == {1, 2, 3}, "the whole job was killed"


def test_dumps_of_the_backends_recorder_are_asked_for_by_their_pipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = flight.FlightRecorder("FR_SIZE", "FR_ON", "FR_PIPE", "FR_DUMP")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name, value in (("FR_SIZE", "7"), ("FR_PIPE", str(tmp_path / "pipe_")), ("FR_DUMP", ""), ("FR_ON", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("FR_DUMP")
    monkeypatch.delenv("FR_ON")
    flight.record_flights(names)
    assert (os.environ["FR_SIZE"], os.environ["FR_ON"]) == ("7", "1"), "the user's, and what was missing"
    pipe, dump = flight.flight_files(names, 3)
    assert pipe == str(tmp_path / "pipe_3.pipe")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    def backend() -> None:  # as ProcessGroupNCCL's monitor does
        asked = b""
        while not asked:
            with contextlib.suppress(BlockingIOError):  # somebody has opened the pipe and not written yet
                asked = os.read(reader, 9)
            time.sleep(0.01)
        Path(dump).write_bytes(b"calls of " + asked)

    thread = threading.Thread(target=backend)
    thread.start()
    found = flight.dumped([(pipe, dump), (str(tmp_path / "nobody.pipe"), str(tmp_path / "x"))])
    thread.join()
    os.close(reader)
    assert found == {dump: b"calls of 1"}
    assert flight.dumped([("", "")]) == {}
    flight.remove_flights((pipe, dump))
    assert Path(pipe).exists(), "the user's"
    assert not Path(dump).parent.exists()
    assert flight.flight_files(None, 0) == ("", "")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    state = State(tmp_path, 5, {}, interval=2, device=False)
    kept = (tmp_path / "rank_5.state").stat()
    assert kept.st_blocks * 512 >= kept.st_size > 0, "a page that is not there on a full disk would be a SIGBUS"
    tp = state.channel("k", "1", "tp", [4, 5])
    for step in (1, 2, 3):
        state.enter_phase(PHASES.index("data"))
        state.leave(state.enter(tp, 3, 1, (2, 3)))
        state.finish_step(step)
    state.enter(tp, 4, 2, None)
    found = read(tmp_path / "rank_5.state")
    assert (found.steps, found.phase, found.ended, sorted(found.windows)) == (3, "other", False, [1])
    assert [c.number for c in found.recent] == [1, 2, 3, 4]
    assert [c.state for c in found.recent] == [LEFT, LEFT, LEFT, INSIDE]
    assert found.recent[2].shape == (2, 3)
    assert found.recent[2].left >= found.recent[2].entered
    last: CollectiveCall = found.last[tp]
    assert (last.number, last.operation, last.dtype, last.shape, last.left) == (4, 4, 2, None, 0)
    (tmp_path / "rank_5.state").write_bytes(b"other")
    with pytest.raises(ValueError, match="no state of a rank"):
        read(tmp_path / "rank_5.state")


def state_of(folder: Path, rank: int, started: str = processes.started(os.getpid())) -> State:
    facts = {"pid": os.getpid(), "started": started, "node": "a", "thread": 1, "device": rank}
    facts |= {"flight": ["", ""], "operations": ["all_to_all_single"], "dtypes": ["", "float32"], "error_file": ""}
    return State(folder, rank, facts, interval=0, device=False)


def watcher_of(folder: Path) -> Watcher:
    sizes = {"node": 0, "nodes": 1, "local": 2, "world": 2}
    return Watcher(Settings(folder=str(folder), shared="", logs="", timeout=9, abort=True, interval=0, **sizes))


def test_ranks_that_end_while_they_are_looked_at_are_not_called_dead(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one ends after its state was read, and before its process is looked for."""
    ranks, watcher = [state_of(tmp_path, rank, started="0") for rank in (0, 1)], watcher_of(tmp_path)
    states = watcher.node.states
    ranks[0].end()

    def states_then_end() -> dict[int, RankSnapshot]:
        found = states()
        if not ranks[1].ended:
            ranks[1].end()
        return found

    monkeypatch.setattr(watcher.node, "states", states_then_end)
    assert not watcher.look()
    assert caplog.text == ""


def test_an_all_to_all_whose_ranks_expect_other_sizes_is_told_once_while_the_job_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sent, received = [[1, 2], [3, 4]], [[1, 3], [5, 4]]  # of 2 rows from 0 to 1, 1 expects 5
    for rank in (0, 1):
        state = state_of(tmp_path, rank)
        channel = state.channel("k", "0", "ep", [0, 1])
        token = state.enter(channel, 0, 1, None)
        state.exchange(token, channel, sent[rank], received[rank])
        state.exchange(token, channel, [], [])  # without sizes all are alike
        state.finish_step(1)
    watcher = watcher_of(tmp_path)
    states = watcher.node.states()
    for later in (1, 6, 6.2, 20, 20.2):
        watcher._compare_calls(states, watcher.begun + later)
        assert ("mismatch" in caplog.text) == (later > 6)
    assert (
        caplog.text.count("mismatch in all_to_all_single #1 of group ep: rank 0 (a, device 0) sends 2 rows to rank 1")
        == 1
    )
    assert "expects 5; what is computed from it is wrong" in caplog.text


def test_a_straggler_is_told_once_after_three_windows_and_when_it_is_over() -> None:
    def work(*seconds: float) -> dict[int, tuple[float, ...]]:
        return {n: tuple(s if phase == "data" else 1.0 for phase in PHASES) for n, s in enumerate(seconds, start=1)}

    stragglers = Stragglers(10, {rank: f"rank {rank}" for rank in range(3)})
    slow = work(9, 9, 1, 9, 9, 9, 9, 1)
    told = []
    for upto in range(1, 9):
        every = {
            rank: {n: w for n, w in each.items() if n <= upto}
            for rank, each in enumerate((work(*[1] * 8), slow, work(*[1] * 8)))
        }
        told.append(stragglers.compare(every))
    assert [len(lines) for lines in told] == [0, 0, 0, 0, 0, 1, 0, 1]
    assert "rank 1 works 2.0 x" in told[5][0]
    assert "most of it in data: 0.9 s a step, the median 0.1 s" in told[5][0]
    assert "as fast as the others again" in told[7][0]


def test_the_place_of_a_thread_in_faulthandlers_text() -> None:
    text = (
        'Thread 0x00007f0000000001 (most recent call first):\n  File "/x/other.py", line 3 in run\n\n'
        "Current thread 0x00007f0000000002 (most recent call first):\n"
        '  File "/v/site-packages/torch/distributed/c.py", line 9 in wait\n'
        '  File "/home/qwen3_npu/data/read/a b.py", line 88 in read\n'
    )
    assert probe.place(text, 0x7F0000000002) == ("torch/distributed/c.py:9 (wait)", "data/read/a b.py:88 (read)")
    assert probe.place(text, 0x7F0000000009) == ("", "")
    assert probe.is_waiting(text) is False
    assert probe.is_waiting(text.replace("torch/distributed/c.py", "qwen3_npu/watch/collectives.py")) is True
    assert probe.is_waiting("") is None


def test_a_rank_is_where_the_thread_is_whose_turn_it_is() -> None:
    waits = (
        '  File "/usr/lib/threading.py", line 5 in acquire\n  File "/x/qwen3_npu/distributed/turns.py", line 6 in f\n'
    )
    works = (
        '  File "/x/qwen3_npu/model/experts.py", line 7 in g\n  File "/x/qwen3_npu/distributed/turns.py", line 8 in w\n'
    )
    heads = (
        "Thread 0x0000000000000001 (most recent call first):\n",
        "Thread 0x0000000000000002 (most recent call first):\n",
    )
    for first, second, turn in ((waits, works, 2), (works, waits, 1), (waits, waits, 1)):
        text = f"{heads[0]}{first}{heads[1]}{second}"
        assert probe.whose_turn(text, 1) == turn
        assert first == second or probe.place(text, turn)[1] == "model/experts.py:7 (g)"
