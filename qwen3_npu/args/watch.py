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


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpikeArgs:
    """spikes and silent corruption"""

    spike_guard: str = flag(
        "off",
        choices=["off", "skip", "rollback"],
        help="of a step whose loss or gradient norm leaps: warn; leave its update out; or go back to the newest "
        "checkpoint and on without its samples, which --save/quarantine.jsonl lists",
    )
    spike_sigma: float = flag(
        6.0, minimum=1, help="a spike is so many deviations (by the median, of the last 128 steps) above the usual"
    )
    max_rollbacks: int = flag(5, minimum=0, help="with --spike-guard rollback: one more ends the training")
    replica_check_interval: int = flag(
        0,
        names=("--check-weight-hash-across-dp-replicas-interval",),
        minimum=0,
        unit="steps",
        help="between comparisons of the weights that ranks hold in common; one also precedes each checkpoint; a rank "
        "that differs ends the training, or with --spike-guard rollback reloads; 0: none",
    )
    state_check_interval: int | None = flag(
        None,
        minimum=0,
        unit="steps",
        help="between steps that find out whether a bit of a weight, moment or master has changed since the last "
        "update; such a training ends, or with --spike-guard rollback goes back; 0: none; default: 1 with "
        "--spike-guard, else 0",
    )
    npu_asd: str | None = flag(
        None,
        choices=["detect", "checksum"],
        help="torch_npu's own detection of silent corruption (NPU_ASD_CONFIG), alone or with checksums of products",
    )

    @property
    def checks_state(self) -> int:
        """--state-check-interval, as it is understood."""
        if self.state_check_interval is None:
            return int(self.spike_guard != "off")
        return self.state_check_interval
