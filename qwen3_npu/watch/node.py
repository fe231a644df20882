"""The ranks of one node, by their files and by the operating system."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from qwen3_npu.watch import probe, state
from qwen3_npu.watch.judge import Channel, Entry, RankReport


@dataclasses.dataclass(frozen=True)
class Report:
    """A rank at one moment, with the stacks of its threads."""

    rank: RankReport
    stack: str


class Node:
    """Reads the files of a folder.

    Attributes:
        infos: rank -> information from its process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.infos: dict[int, dict[str, Any]] = {}

    def states(self) -> dict[int, state.RankSnapshot]:
        """The states of all ranks that have started."""
        found = {}
        for path in sorted(self.folder.glob("rank_*.state")):
            rank = int(path.stem.removeprefix("rank_"))
            if rank not in self.infos:
                self.infos[rank] = state.read_info(path.with_suffix(".info"))[0]
            found[rank] = state.read(path)
        return found

    def pids(self) -> dict[int, tuple[int, str]]:
        """rank -> (process id, start time)."""
        return {rank: (info["pid"], info["started"]) for rank, info in self.infos.items()}

    def living(self) -> set[int]:
        """Ranks whose process is alive."""
        return {rank for rank, (pid, since) in self.pids().items() if probe.is_alive(pid, since)}

    def reports(self) -> list[Report]:
        """Complete reports of all ranks. Takes some seconds if a rank does not answer."""
        states = self.states()
        processes = probe.probe_processes(self.pids())
        answering = {r: self.infos[r]["pid"] for r, p in processes.items() if p.alive and p.state not in ("T", "t")}
        stacks = probe.ask_stacks(answering, self.folder)
        return [self._report(rank, read, processes[rank], stacks.get(rank, "")) for rank, read in states.items()]

    def calls(self, states: dict[int, state.RankSnapshot]) -> list[RankReport]:
        """The ranks with their calls alone: their processes are not looked at."""
        return [self._report(rank, read, probe.Process(True), "").rank for rank, read in states.items()]

    def _report(self, number: int, read: state.RankSnapshot, process: probe.Process, stack: str) -> Report:
        info, channels = state.read_info(self.folder / f"rank_{number}.info")
        now = time.monotonic()
        main = info["thread"]
        running = probe.whose_turn(stack, main)
        inner, at = probe.place(stack, running)
        known = {}
        for each in channels:
            index = each["index"]
            if index in read.last:
                calls = tuple(_entry(call, info, now) for call in read.recent if call.channel == index)
                last = _entry(read.last[index], info, now)
                exchange = read.exchanges.get(index, (0, [], []))
                known[each["name"]] = Channel(each["label"], tuple(each["ranks"]), last, calls, exchange=exchange)
        rank = RankReport(
            rank=number,
            node=info["node"],
            device=info["device"],
            pid=info["pid"],
            alive=process.alive,
            state=process.state,
            waits_in=process.waits_in,
            computes=process.computes,
            ended=read.ended,
            steps=read.steps,
            phase=read.phase,
            age=now - read.since,
            at=at,
            inner=inner,
            main="" if running == main else probe.place(stack, main)[1],
            channels=known,
            waits=probe.is_waiting(stack),
        )
        return Report(rank, stack)


def _entry(call: state.CollectiveCall, info: dict[str, Any], now: float) -> Entry:
    operation, dtype = info["operations"][call.operation], info["dtypes"][call.dtype]
    return Entry(call.number, operation, dtype, call.shape, state=call.state, age=now - call.entered)


def to_text(reports: list[Report]) -> str:
    """Reports as text, for the watcher of another node."""
    return json.dumps([dataclasses.asdict(report) for report in reports])


def from_text(text: str) -> list[Report]:
    """Reports from the text of `to_text`. Raises: ValueError, TypeError, KeyError: the text is damaged."""
    reports = []
    for each in json.loads(text):
        fields = each["rank"]
        fields["channels"] = {name: _channel(channel) for name, channel in fields["channels"].items()}
        reports.append(Report(RankReport(**fields), str(each["stack"])))
    return reports


def _channel(fields: dict[str, Any]) -> Channel:
    calls = tuple(_of(call) for call in fields["calls"])
    number, sent, received = fields["exchange"]
    last, exchange = _of(fields["last"]), (number, sent, received)
    return Channel(fields["label"], tuple(fields["ranks"]), last, calls, exchange=exchange)


def _of(fields: dict[str, Any]) -> Entry:
    shape = fields["shape"]
    return Entry(**{**fields, "shape": None if shape is None else tuple(shape)})
