"""What a training tells: a line on the console, metrics.jsonl, tensorboard. Rank 0 only."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, TextIO

from qwen3_npu import log
from qwen3_npu.model.arch import Qwen3Arch, flops_per_token
from qwen3_npu.platform.base import Platform
from qwen3_npu.progress import duration, human
from qwen3_npu.training.step import StepResult


@dataclasses.dataclass
class _Window:
    """Steps since the last line."""

    steps: int = 0
    updates: int = 0
    loss: float = 0.0
    start: float = dataclasses.field(default_factory=time.perf_counter)


class Reporter:
    """Collects steps and reports every `interval` of them.

    Args:
        tokens_per_step: of the global batch.
        devices: all of the job; rates are per device.
        first, last: steps before and after this run.
        folder: of metrics.jsonl and tensorboard events; None for the console only.
    """

    def __init__(
        self,
        platform: Platform,
        arch: Qwen3Arch,
        *,
        seq_length: int,
        tokens_per_step: int,
        devices: int,
        interval: int,
        first: int,
        last: int,
        folder: Path | None,
        speaks: bool,
    ) -> None:
        self.platform, self.interval, self.last, self.speaks = platform, interval, last, speaks
        self.tokens_per_device = tokens_per_step / devices
        self.flops_per_step = self.tokens_per_device * flops_per_token(arch, seq_length)
        self.peak = platform.peak_flops()
        self.window = _Window()
        self.metrics: TextIO | None = None
        self.tensorboard: Any = None
        if folder is not None and speaks:
            folder.mkdir(parents=True, exist_ok=True)
            self.metrics = open(folder / "metrics.jsonl", "a", encoding="utf-8", buffering=1)
            # Here, not at the top: it takes a second, and only rank 0 with a folder needs it.
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder), purge_step=first + 1)

    def step(self, iteration: int, result: StepResult) -> None:
        """Count one training step; it is `iteration` (from 1)."""
        self.window.steps += 1
        if result.skipped:
            self._write(iteration, {"skipped": 1.0})
        else:
            self.window.updates += 1
            self.window.loss += result.loss
        self._write(iteration, {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.learning_rate})
        if iteration % self.interval == 0 or iteration == self.last:
            self._line(iteration, result)

    def _line(self, iteration: int, result: StepResult) -> None:
        self.platform.synchronize()
        seconds = (time.perf_counter() - self.window.start) / self.window.steps
        tokens, flops = self.tokens_per_device / seconds, self.flops_per_step / seconds
        memory = self.platform.memory_peak() / 2**30
        width = len(str(self.last))
        parts = [
            f"step {iteration:>{width}}/{self.last}",
            f"loss {self.window.loss / max(self.window.updates, 1):.6f}",
            f"grad norm {result.grad_norm:.4f}",
            f"lr {result.learning_rate:.4e}",
            f"{human(tokens, 'tokens/s')}/device",
            f"{human(flops, 'FLOP/s')}/device",
        ]
        rates = {"tokens_per_s_per_device": tokens, "tflops_per_device": flops / 1e12, "memory_gib": memory}
        if self.peak:
            parts.append(f"MFU {100 * flops / self.peak:.1f} %")
            rates["mfu"] = flops / self.peak
        parts += [f"{memory:.2f} GiB", f"{seconds:.3g} s/step", f"{duration((self.last - iteration) * seconds)} left"]
        log.info(" | ".join(parts))
        self._write(iteration, rates | {"seconds_per_step": seconds})
        self.window = _Window()

    def evaluation(self, iteration: int, split: str, loss: float) -> None:
        """The loss on another split after `iteration` steps."""
        log.info(f"step {iteration} | {split} loss {loss:.6f}")
        self._write(iteration, {f"{split}_loss": loss})
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the rates what was not training (evaluation, checkpoints)."""
        if self.window.steps == 0:
            self.window = _Window()

    def _write(self, iteration: int, values: dict[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.write(json.dumps({"step": iteration, **values}) + "\n")
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, iteration)

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()
            self.tensorboard.close()
