"""Where the time of a rank goes: own work by phase, waits by group of ranks, garbage collection. No torch."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence

from qwen3_npu.watch.state import PHASES

GROUPS = ("tp", "pp", "dp", "dp-cp", "cp", "ep", "etp", "edp", "tp-pp", "world", "other groups")
KINDS = (*PHASES, *(f"wait {name}" for name in GROUPS), "garbage")
_NUMBERS = {name: len(PHASES) + i for i, name in enumerate(GROUPS)}


class Times:
    """Seconds of each kind since the last `take`. All of the time is of one kind or another."""

    def __init__(self) -> None:
        self.seconds = [0.0] * len(KINDS)
        self.phase, self.held, self.elsewhere = 0, False, 0.0  # seconds of this phase that are of another kind
        self.since = self.began = self.collecting = time.monotonic()

    def enter_phase(self, phase: int) -> None:
        """From now on the rank is in this phase."""
        now = time.monotonic()
        self.seconds[self.phase] += max(now - self.since - self.elsewhere, 0.0)
        self.phase, self.since, self.elsewhere = phase, now, 0.0

    def finish_step(self, step: int) -> None:
        """A step is done."""
        self.enter_phase(PHASES.index("other"))

    def wait(self, label: str, seconds: float) -> None:
        """So long this rank has waited for others of a group."""
        self.seconds[_NUMBERS.get(label.removesuffix(" (host)"), _NUMBERS["other groups"])] += seconds
        self.elsewhere += seconds

    def collects(self, phase: str, info: object) -> None:
        """For `gc.callbacks`."""
        if phase == "start":
            self.collecting = time.monotonic()
        else:
            seconds = time.monotonic() - self.collecting
            self.seconds[-1] += seconds
            self.elsewhere += seconds

    def take(self) -> Sequence[float]:
        """Seconds of `KINDS`, then of the wall clock; all begin anew."""
        self.enter_phase(self.phase)
        found = [*self.seconds, self.since - self.began]
        self.seconds, self.began = [0.0] * len(KINDS), self.since
        return found

    def install(self) -> None:
        """Listen to Python's garbage collection, until `remove`."""
        gc.callbacks.append(self.collects)

    def remove(self) -> None:
        """No more."""
        gc.callbacks.remove(self.collects)
