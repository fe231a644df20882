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
        help="a hang is reported after this time without progress; 0: never; default: 60, or 10 times the median step "
        "if that is longer; for the first step, evaluations and checkpoints at least 600",
    )
    on_hang: str = flag("abort", choices=["report", "abort"], help="abort: end all processes after the report")
    straggler_interval: int = flag(100, minimum=0, help="steps between comparisons of the ranks' own work; 0: none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpikeArgs:
    """spikes and silent corruption"""

    spike_guard: str = flag(
        "off",
        choices=["off", "skip", "rollback"],
        help="reaction to a leap of loss or gradient norm. off: warn; skip: no update; rollback: return to the "
        "newest checkpoint and omit the step's samples, which --save/quarantine.jsonl lists",
    )
    spike_sigma: float = flag(
        6.0, minimum=1, help="a spike is this number of deviations (robust, of the last 128 steps) above the median"
    )
    max_rollbacks: int = flag(5, minimum=0, help="with --spike-guard rollback: one rollback more ends the training")
    replica_check_interval: int = flag(
        0,
        names=("--check-weight-hash-across-dp-replicas-interval",),
        minimum=0,
        help="steps between comparisons of replicated weights, also before each checkpoint; a rank that differs ends "
        "the training, or causes a rollback with --spike-guard rollback; 0: none",
    )
    state_check_interval: int | None = flag(
        None,
        minimum=0,
        help="steps between checks for bits of weights, moments and masters that changed since the last update; this "
        "ends the training, or causes a rollback with --spike-guard rollback; 0: none; default: 1 with "
        "--spike-guard, else 0",
    )
    npu_asd: str | None = flag(
        None,
        choices=["detect", "checksum"],
        help="torch_npu's own detection of silent corruption (NPU_ASD_CONFIG); checksum: also checksums of products",
    )

    @property
    def checks_state(self) -> int:
        """--state-check-interval, or its default."""
        if self.state_check_interval is None:
            return int(self.spike_guard != "off")
        return self.state_check_interval
