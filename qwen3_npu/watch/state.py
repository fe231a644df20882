"""The state of one rank in a file mapped into memory: written in microseconds, readable when its process is stuck.

Layout: a header, the durations of the last steps, the last windows of own work, the last call of each channel, a ring
of calls, and of some channels how the last all-to-all divided its tensors. Numbers are little-endian, times are seconds
of CLOCK_MONOTONIC, which all processes of a machine share. A channel is a process group, or one direction between two
ranks of it: calls there have the same order on all members.
`rank_N.info` beside the file names the process and the channels, a JSON object a line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import os
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qwen3_npu.files import rename

STEP = ("data", "forward", "backward", "reduce", "optimizer")
PHASES = ("start", *STEP, "eval", "save", "report", "check", "other")
WORK = (*STEP, "report", "check", "other")  # what a rank does for each step
STEPS, WINDOWS, CHANNELS, CALLS = 64, 8, 512, 256  # how many of each are kept
EXCHANGES, MEMBERS = 8, 128  # channels whose all-to-all is kept, and ranks of such a group at most

_HEAD = struct.Struct("<8sqqqdqq")  # magic, beats, steps done, phase, since when, ended, calls
_MAGIC = b"QWATCH1\n"
_WINDOW = struct.Struct(f"<q{len(PHASES)}d")  # number, seconds of own work in each phase
# sequence number, channel, operation, dtype, state, dimensions, time of entry, time of leaving, the first 4 sizes
_CALL = struct.Struct("<qHHHBBdd4q")
_STEPS_AT = 256
_WINDOWS_AT = _STEPS_AT + 8 * STEPS
_LAST_AT = _WINDOWS_AT + WINDOWS * _WINDOW.size
_RING_AT = _LAST_AT + CHANNELS * _CALL.size
_EXCHANGE = struct.Struct(f"<qqq{2 * MEMBERS}q")  # number of the call, channel, ranks; sizes that go out, and come in
_EXCHANGES_AT = _RING_AT + CALLS * _CALL.size
_SIZE = _EXCHANGES_AT + EXCHANGES * _EXCHANGE.size

INSIDE, LAUNCHED, LEFT = 1, 2, 3  # LAUNCHED: passed to a device, which does not report when it is done


@dataclasses.dataclass(frozen=True)
class CollectiveCall:
    """One call of a collective, or one send or receive.

    Attributes:
        number: index of the call in its channel, from 1.
        shape: of this rank's tensor that must be equal on all ranks; None: sizes may differ.
        entered, left: seconds of CLOCK_MONOTONIC; `left` is 0 while the call runs.
    """

    number: int
    channel: int
    operation: int
    dtype: int
    state: int
    shape: tuple[int, ...] | None
    entered: float
    left: float


class State:
    """The writer's side.

    Args:
        info: information about this process for the reader; `operations` and `dtypes` name the numbers in calls.
        interval: steps of a window of own work; 0: none.
        device: calls run on a device, so they may not be finished when `wait` returns.
    """

    def __init__(self, folder: Path, rank: int, info: dict[str, object], *, interval: int, device: bool) -> None:
        self.interval, self.done = interval, LAUNCHED if device else LEFT
        self.info = open(folder / f"rank_{rank}.info", "w", encoding="utf-8", buffering=1)
        self.info.write(json.dumps(info) + "\n")
        path = folder / f"rank_{rank}.state"
        partial = path.with_suffix(".partial")
        with open(partial, "wb+") as file:
            os.posix_fallocate(file.fileno(), 0, _SIZE)  # a page that cannot be allocated later would be a SIGBUS
            self.map = mmap.mmap(file.fileno(), _SIZE)
        self.beats = self.steps = self.calls = 0
        self.phase, self.ended, self.held = 0, 0, False
        self.waited = self.waited_before = 0.0  # seconds in `wait`
        self.since = self.step_end = time.monotonic()
        self.work = [0.0] * len(PHASES)
        self.window = 0
        self.channels: dict[object, int] = {}
        self.numbers: list[int] = []
        self.exchanges: dict[int, int] = {}  # channel -> where its last all-to-all is
        self._head()
        rename(partial, path)

    def channel(self, key: object, name: str, label: str, ranks: Sequence[int]) -> int:
        """Register a channel. If there is no room, it shares the last one.

        Args:
            key: key of the channel in this process.
            name: equal on all its members, and different from other channels' names.
            label: name for messages.
        """
        index = min(len(self.numbers), CHANNELS - 1)
        if index == len(self.numbers):
            self.numbers.append(0)
            with contextlib.suppress(OSError):  # a full disk costs a name in a report, not the training
                self.info.write(json.dumps({"index": index, "name": name, "label": label, "ranks": list(ranks)}) + "\n")
        self.channels[key] = index
        return index

    def enter(self, channel: int, operation: int, dtype: int, shape: tuple[int, ...] | None) -> tuple[int, int, int]:
        """A call begins. Returns its token for `leave`."""
        number = self.numbers[channel] = self.numbers[channel] + 1
        slot = _RING_AT + (self.calls % CALLS) * _CALL.size
        self.calls += 1
        dims = 255 if shape is None else len(shape)
        sizes = ((shape or ()) + (0, 0, 0, 0))[:4]
        now = time.monotonic()
        entry = _CALL.pack(number, channel, operation, dtype, INSIDE, dims, now, 0.0, *sizes)
        last = _LAST_AT + channel * _CALL.size
        self.map[slot : slot + _CALL.size] = entry
        self.map[last : last + _CALL.size] = entry
        self._head()
        return slot, last, number

    def exchange(self, token: tuple[int, int, int], channel: int, sent: Sequence[int], received: Sequence[int]) -> None:
        """How the all-to-all that has just begun divides its tensors among the ranks of the group."""
        size, is_full = len(sent), len(self.exchanges) == EXCHANGES and channel not in self.exchanges
        if is_full or not 0 < size <= MEMBERS or len(received) != size:  # without sizes there is nothing to compare
            return
        at = self.exchanges.setdefault(channel, _EXCHANGES_AT + len(self.exchanges) * _EXCHANGE.size)
        struct.pack_into(f"<qqq{2 * size}q", self.map, at, token[2], channel, size, *sent, *received)

    def leave(self, token: tuple[int, int, int]) -> None:
        """The call has ended, as far as the host knows."""
        now = time.monotonic()
        for at in token[:2]:
            if int.from_bytes(self.map[at : at + 8], "little") == token[2]:  # no later call has taken its place
                self.map[at + 14] = self.done
                struct.pack_into("<d", self.map, at + 24, now)
        self._head()

    def enter_phase(self, phase: int) -> None:
        """Enter a phase."""
        now = time.monotonic()
        self.work[self.phase] += now - self.since - (self.waited - self.waited_before)
        self.phase, self.since, self.waited_before = phase, now, self.waited
        self._head()

    def finish_step(self, step: int) -> None:
        """A step is done; it is `step` (from 1)."""
        self.enter_phase(PHASES.index("other"))
        struct.pack_into("<d", self.map, _STEPS_AT + 8 * (step % STEPS), self.since - self.step_end)
        self.steps, self.step_end = step, self.since
        if self.interval and step % self.interval == 0:
            self.window = step // self.interval
            at = _WINDOWS_AT + (self.window % WINDOWS) * _WINDOW.size
            _WINDOW.pack_into(self.map, at, self.window, *self.work)
            self.work = [0.0] * len(PHASES)
        self._head()

    def end(self) -> None:
        """The rank has ended normally, or reports an error itself."""
        self.ended = 1
        self._head()
        self.info.close()

    def _head(self) -> None:
        self.beats += 1
        _HEAD.pack_into(self.map, 0, _MAGIC, self.beats, self.steps, self.phase, self.since, self.ended, self.calls)


@dataclasses.dataclass(frozen=True)
class RankSnapshot:
    """A rank's state in the file.

    Attributes:
        durations: of the last steps, in seconds.
        windows: number -> seconds of own work in each phase.
        last: channel -> its last call.
        recent: the last calls, the oldest first.
        exchanges: channel -> number of its last all-to-all, sizes that this rank sends to each member, and gets of it.
    """

    beats: int
    steps: int
    phase: str
    since: float
    ended: bool
    durations: list[float]
    windows: dict[int, tuple[float, ...]]
    last: dict[int, CollectiveCall]
    recent: list[CollectiveCall]
    exchanges: dict[int, tuple[int, list[int], list[int]]] = dataclasses.field(default_factory=dict)


def read(path: Path) -> RankSnapshot:
    """Read a rank's state. Raises: OSError, ValueError: there is no state, or it has another version."""
    data = path.read_bytes()
    if len(data) != _SIZE or data[:8] != _MAGIC:
        raise ValueError(f"{path} is no state of a rank")
    _, beats, steps, phase, since, ended, calls = _HEAD.unpack_from(data)
    durations = [d for d in struct.unpack_from(f"<{STEPS}d", data, _STEPS_AT) if d > 0]
    windows = {}
    for number, *work in (_WINDOW.unpack_from(data, _WINDOWS_AT + i * _WINDOW.size) for i in range(WINDOWS)):
        if number:
            windows[number] = tuple(work)
    last = {}
    for i in range(CHANNELS):
        if call := _call(data, _LAST_AT + i * _CALL.size):
            last[i] = call
    ring = (_call(data, _RING_AT + (i % CALLS) * _CALL.size) for i in range(max(calls - CALLS, 0), calls))
    recent = [call for call in ring if call]
    return RankSnapshot(
        beats,
        steps,
        PHASES[phase],
        since,
        ended=bool(ended),
        durations=durations,
        windows=windows,
        last=last,
        recent=recent,
        exchanges=dict(_exchanges(data)),
    )


def _exchanges(data: bytes) -> Iterator[tuple[int, tuple[int, list[int], list[int]]]]:
    for i in range(EXCHANGES):
        number, channel, size, *sizes = _EXCHANGE.unpack_from(data, _EXCHANGES_AT + i * _EXCHANGE.size)
        if number:
            yield channel, (number, sizes[:size], sizes[size : 2 * size])


def _call(data: bytes, at: int) -> CollectiveCall | None:
    number, channel, operation, dtype, state, dims, entered, left, *sizes = _CALL.unpack_from(data, at)
    if not number:
        return None
    shape = None if dims == 255 else tuple(sizes[: min(dims, 4)])
    return CollectiveCall(number, channel, operation, dtype, state=state, shape=shape, entered=entered, left=left)


def read_info(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The information of the process, and its channels."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return records[0], records[1:]
