"""Reasons to stop before --train-iters: a signal, or the time limit. All ranks decide together."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from types import FrameType

from qwen3_npu.args.training import ExitArgs


class Exits:
    """Notices signals; the step carries them to the other ranks."""

    def __init__(self, args: ExitArgs) -> None:
        self.limit = args.exit_duration_in_mins * 60 if args.exit_duration_in_mins is not None else None
        self.interval = args.exit_interval
        self.start = time.monotonic()
        self.signal: str | None = None
        self.watches = args.exit_signal_handler or self.limit is not None
        if args.exit_signal_handler:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, self._notice)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name

    def wishes(self) -> tuple[bool, ...]:
        """The wishes of this rank: a signal was received, the time limit is reached. Empty if neither is watched."""
        if not self.watches:
            return ()
        expired = self.limit is not None and time.monotonic() - self.start >= self.limit
        return self.signal is not None, expired

    def reason(self, iteration: int, wishes: Sequence[bool]) -> str | None:
        """Why all ranks should stop after this step, or None.

        Args:
            wishes: `wishes` of all ranks, true if true on any rank.
        """
        if self.interval and iteration % self.interval == 0:
            return f"--exit-interval {self.interval}"
        signalled, expired = wishes or (False, False)
        if signalled:
            return self.signal or "a signal to another process"
        return "--exit-duration-in-mins is over" if expired else None
