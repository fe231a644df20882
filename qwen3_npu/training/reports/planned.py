"""Compare the plan with measurements of rank 0, after its third step and at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from qwen3_npu.ledger.records import LedgerEntry
from qwen3_npu.ledger.why import why
from qwen3_npu.plan.device import GIB
from qwen3_npu.plan.show.report import layout_words
from qwen3_npu.plan.verdict import PlanVerdict
from qwen3_npu.platform.base import Platform

_TOLD_AT = 3  # steps of this run; the first warms up and is not part of a mean
_LARGE = 0.15


class PlannedMeasured:
    """Clock and comparison of one run. It waits for the device twice: after steps 1 and 3.

    Memory is that of tensors at the peak, so the plan's reserve for the runtime is not counted.

    Args:
        entries: where the time of this run goes, for what is slower than planned.
        write: one record for metrics.jsonl.
        tell: one line for the console.
    """

    def __init__(
        self,
        platform: Platform,
        verdict: PlanVerdict,
        entries: Sequence[LedgerEntry],
        *,
        write: Callable[[int, dict[str, str | float]], None],
        tell: Callable[[str], None],
    ) -> None:
        self.platform, self.verdict, self.write, self.tell = platform, verdict, write, tell
        self.entries = entries
        self.steps, self.start, self.places = 0, 0.0, 0.0
        self.latest: tuple[int, int, float, float] | None = None  # iteration, steps, seconds, places
        self.told = 0

    def step(self, iteration: int, places: float) -> None:
        """Count a step with this number of tokens, padding included."""
        self.steps += 1
        if self.steps == 1:
            self.platform.synchronize()
            self.start = time.perf_counter()
            return
        self.places += places
        if self.steps == _TOLD_AT:
            self.platform.synchronize()
            self.synchronized(iteration)
            self._report()

    def synchronized(self, iteration: int) -> None:
        """Called when the host has just waited for the device."""
        if self.steps > 1:
            self.latest = iteration, self.steps, time.perf_counter() - self.start, self.places

    def pause(self, seconds: float) -> None:
        """Subtract seconds that were no training."""
        self.start += seconds

    def close(self) -> None:
        """Log the mean over all steps, unless it was logged."""
        if self.latest is not None and self.latest[1] > self.told:
            self._report()

    def _report(self) -> None:
        assert self.latest is not None
        iteration, steps, elapsed, places = self.latest
        self.told = steps
        verdict = self.verdict
        stage = verdict.stages[0]
        planned_bytes, planned_seconds = stage.total - stage.reserve, verdict.time.total
        seconds, memory = elapsed / (steps - 1), float(self.platform.memory_peak())
        more_memory, more_time = memory / planned_bytes - 1, seconds / planned_seconds - 1
        line = (
            f"planned {planned_bytes / GIB:.1f} GiB, measured {memory / GIB:.1f} ({100 * more_memory:+.0f} %); "
            f"planned {planned_seconds:.3g} s/step, measured {seconds:.3g} ({100 * more_time:+.0f} %)"
        )
        setup = verdict.setup
        share = places / (steps - 1) / (setup.global_batch * setup.seq_length)
        if abs(share - 1) > _LARGE:
            line += f"; a step had {100 * share:.0f} % of the tokens planned"
        elif max(abs(more_memory), abs(more_time)) > _LARGE:
            line += f"; {why(self.entries)}" if more_time > _LARGE and self.entries else ""
            line += "; python -m qwen3_npu.plan --learn makes a table of this run, for later plans"
        self.tell(line)
        self.write(
            iteration,
            {
                "device": verdict.device.name,
                "layout": layout_words(verdict),
                "planned_step_seconds": planned_seconds,
                "measured_step_seconds": seconds,
                "planned_bytes": planned_bytes,
                "measured_bytes": memory,
            },
        )
