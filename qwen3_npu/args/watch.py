"""Flags of the watch over hangs and stragglers."""

from __future__ import annotations

import dataclasses

from qwen3_npu.cli import flag


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchArgs:
    """hangs and stragglers"""

    hang_timeout: float | None = flag(
        None,
        minimum=0,
        unit="s",
        help="without any progress a hang is reported after this; 0: never; default: 60 or, if that is more, 10 times "
        "the median step; the first step, evaluations and checkpoints have at least 600",
    )
    on_hang: str = flag("abort", choices=["report", "abort"], help="abort: end all processes after the report")
    straggler_interval: int = flag(
        100, minimum=0, unit="steps", help="between comparisons of the ranks' own work; 0: none"
    )
