"""Ranks whose own work takes longer than the others', window after window."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from qwen3_npu.watch.state import PHASES, WORK

SLOW = 1.3  # a straggler needs so many times the median of all ranks
WINDOWS = 3  # so many windows in a row
_LEAST = 0.001  # seconds a step: less is noise
_WORK = [*map(PHASES.index, WORK)]


class Stragglers:
    """Compares windows of all ranks.

    Args:
        interval: steps of a window.
        names: rank -> "rank 3 (node1, device 3)".
    """

    def __init__(self, interval: int, names: Mapping[int, str]) -> None:
        self.interval, self.names, self.done = interval, names, 0
        self.streaks = dict.fromkeys(names, 0)

    def compare(self, windows: Mapping[int, Mapping[int, Sequence[float]]]) -> list[str]:
        """rank -> window's number -> seconds of own work in each phase  =>  messages about new windows."""
        shared = set.intersection(*(set(own) for own in windows.values())) if windows else set()
        told = []
        for number in sorted(n for n in shared if n > self.done):
            if number != self.done + 1:
                self.streaks = dict.fromkeys(self.names, 0)
            self.done = number
            told += self._window({rank: own[number] for rank, own in windows.items()})
        return told

    def _window(self, works: Mapping[int, Sequence[float]]) -> list[str]:
        totals = {rank: sum(work[phase] for phase in _WORK) / self.interval for rank, work in works.items()}
        middle = statistics.median_low(totals.values())
        told = []
        for rank, total in totals.items():
            if total <= SLOW * middle or total - middle < _LEAST:
                if self.streaks[rank] >= WINDOWS:
                    told.append(f"straggler: {self.names[rank]} is as fast as the others again")
                self.streaks[rank] = 0
                continue
            self.streaks[rank] += 1
            if self.streaks[rank] == WINDOWS:
                told.append(self._slow(rank, works, total / max(middle, 1e-9)))
        return told

    def _slow(self, rank: int, works: Mapping[int, Sequence[float]], ratio: float) -> str:
        medians = {phase: statistics.median_low(work[phase] for work in works.values()) for phase in _WORK}
        phase = max(_WORK, key=lambda phase: works[rank][phase] - medians[phase])
        own, usual = works[rank][phase] / self.interval, medians[phase] / self.interval
        return (
            f"straggler: {self.names[rank]} works {ratio:.1f} x as long as the median rank, for {WINDOWS} times "
            f"{self.interval} steps; most of it in {PHASES[phase]}: {own:.3g} s a step, the median {usual:.3g} s"
        )
