"""--profile: a trace of some steps, for tensorboard or chrome://tracing (on an NPU: MindStudio Insight)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen3_npu import log
from qwen3_npu.args.training import ProfileArgs
from qwen3_npu.platform.base import Platform


class Profiler:
    """Traces the steps after --profile-step-start up to --profile-step-end, on --profile-ranks."""

    def __init__(self, args: ProfileArgs, platform: Platform, rank: int) -> None:
        self.args, self.platform = args, platform
        self.works = args.profile and (args.profile_ranks == [-1] or rank in args.profile_ranks)
        self.folder = Path(args.profile_save_path) / f"rank{rank}"
        self.trace: Any = None

    def before(self, iteration: int) -> None:
        """Call before each step; `iteration` steps are done."""
        if self.works and iteration == self.args.profile_step_start:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.trace = self.platform.profiler(self.folder, self.args)
            self.trace.start()

    def after(self, iteration: int) -> None:
        """Call after each step; `iteration` steps are done."""
        if self.trace is not None and iteration >= self.args.profile_step_end:
            self.finish()

    def finish(self) -> None:
        """Write what was traced, if anything."""
        if self.trace is not None:
            self.platform.synchronize()
            self.trace.stop()
            self.trace = None
            log.info(f"trace: {self.folder}")
