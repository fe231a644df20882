"""Reasons to stop before --train-iters: a signal, or the time is up. All ranks decide together."""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch

from qwen3_npu.args.training import ExitArgs
from qwen3_npu.training.guard import anywhere


class Exits:
    """Notices signals; the loop asks at every step whether to save and leave."""

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

    def reason(self, iteration: int, device: torch.device) -> str | None:
        """Why all ranks should stop after this step, or None. Every rank must call this."""
        if self.interval and iteration % self.interval == 0:
            return f"--exit-interval {self.interval}"
        if not self.watches:
            return None
        expired = self.limit is not None and time.monotonic() - self.start >= self.limit
        if anywhere(self.signal is not None, device):
            return self.signal or "a signal to another process"
        if anywhere(expired, device):
            return "--exit-duration-in-mins is over"
        return None
