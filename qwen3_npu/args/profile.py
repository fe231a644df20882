"""Flags of profiling, under MindSpeed-LLM's names."""

from __future__ import annotations

import dataclasses

from qwen3_npu.cli import flag
from qwen3_npu.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileArgs:
    """profiling"""

    profile: bool = flag(False, help="record the operations of device and host in some steps")
    profile_step_start: int = flag(10, minimum=0, unit="steps", help="steps before the recording")
    profile_step_end: int = flag(12, minimum=1, unit="steps", help="last step of the recording")
    profile_ranks: list[int] = flag([0], minimum=-1, help="processes that record; -1: all")
    profile_level: str = flag(
        "level0", choices=["level_none", "level0", "level1", "level2"], help="level of detail on an NPU"
    )
    profile_with_cpu: bool = flag(False, help="on an NPU: record the host's operations, too")
    profile_with_stack: bool = flag(False, help="record the Python line of each operation")
    profile_with_memory: bool = flag(False, help="with memory")
    profile_record_shapes: bool = flag(False, help="record the shapes of tensors")
    profile_save_path: str = flag("./profile_dir", metavar="DIR", help="folder for tensorboard or MindStudio Insight")

    def __post_init__(self) -> None:
        if self.profile and self.profile_step_end <= self.profile_step_start:
            raise UsageError(
                f"--profile-step-end {self.profile_step_end} must be above --profile-step-start "
                f"{self.profile_step_start}"
            )
