"""Record some steps of a training with the device's own profiler."""

from __future__ import annotations

from collections.abc import Callable

from qwen3_npu import log
from qwen3_npu.args.profile import ProfileArgs
from qwen3_npu.platform.base import Platform
from qwen3_npu.watch import here


class Profiling:
    """Starts and stops the profiler between steps, on the ranks that were asked for."""

    def __init__(self, platform: Platform, args: ProfileArgs, rank: int, *, first: int, last: int) -> None:
        """
        Args:
            first, last: the steps of this run.
        """
        self.args = args
        if args.profile and not first <= args.profile_step_start + 1 <= last:
            log.info(
                f"warning: no step is profiled: --profile-step-start {args.profile_step_start} comes before step "
                f"{args.profile_step_start + 1}, and the steps of this run are {first} to {last}"
            )
        chosen = args.profile and (rank in args.profile_ranks or -1 in args.profile_ranks)
        self.profiler = platform.profiler(args) if chosen else None
        self.running = False

    def before(self, iteration: int) -> None:
        """Call it before step `iteration` (from 1)."""
        if self.profiler is not None and not self.running and iteration == self.args.profile_step_start + 1:
            self.running = self._done(self.profiler.start)

    def after(self, iteration: int, *, last: bool) -> None:
        """Call it after the step; the last step of a training ends a recording."""
        if self.profiler is not None and self.running and (iteration >= self.args.profile_step_end or last):
            self.running = False
            if self._done(self.profiler.stop):
                log.info(f"profile: {self.args.profile_save_path}")

    def _done(self, act: Callable[[], None]) -> bool:
        """Start or stop the profiler; an unwritable folder is a warning."""
        try:
            with here.during("report"):
                act()
        except (OSError, RuntimeError) as error:
            log.warning(f"--profile-save-path {self.args.profile_save_path}: nothing was recorded: {error}")
            self.profiler = None
        return self.profiler is not None
