"""The reports of a training: lines on the console, metrics.jsonl, tensorboard. Rank 0 only."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3_npu import log, schema
from qwen3_npu.ledger.picture import heat, png
from qwen3_npu.ledger.records import LedgerEntry, entry_of
from qwen3_npu.ledger.show import report, shares_line
from qwen3_npu.model.arch import Qwen3Arch, flops_per_token
from qwen3_npu.plan.verdict import PlanVerdict
from qwen3_npu.platform.base import Platform
from qwen3_npu.progress import duration, human
from qwen3_npu.training.reports.expert_load import ExpertLoad
from qwen3_npu.training.reports.planned import PlannedMeasured
from qwen3_npu.training.reports.records import Records
from qwen3_npu.training.reports.trackers import Tracked, finite
from qwen3_npu.training.step import NOTHING, StepResult, Tally

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def means(tally: Tally, names: Sequence[str]) -> dict[str, float]:
    """An objective's metrics by name.

    If it counts chosen and rejected answers (`count/chosen`), their means are over these counts, and metrics without
    answers are omitted. All other metrics are means over the units of the loss.
    """
    sums = dict(zip(names, tally.metrics, strict=True))
    counts = {name.partition("/")[2]: value for name, value in sums.items() if name.startswith("count/")}
    found = {}
    for name, value in sums.items():
        if (count := counts.get(name.partition("/")[2], tally.loss_weight)) and not name.startswith("count/"):
            found[name] = value / count
    if counts and all(counts.values()):
        found["rewards/margin"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found


@dataclasses.dataclass
class _LogInterval:
    """Steps since the last line.

    Attributes:
        loss: sum of the losses of the `learned_steps` steps that were not skipped.
        computed, learned: of all steps, and of those that were not skipped.
    """

    steps: int = 0
    learned_steps: int = 0
    loss: float = 0.0
    computed: Tally = NOTHING
    learned: Tally = NOTHING
    start: float = dataclasses.field(default_factory=time.perf_counter)

    def add(self, result: StepResult) -> None:
        self.steps += 1
        self.computed += result.tally
        if not result.skipped:
            self.learned_steps += 1
            self.loss += result.loss
            self.learned += result.tally

    def preference(self, names: Sequence[str]) -> tuple[dict[str, float], list[str]]:
        """Means over the answers of all steps, as values and as text."""
        values = means(self.computed, names)
        shown = [f"{name} {values[key]:.4f}" for name in ("accuracy", "margin") if (key := f"rewards/{name}") in values]
        return values, [", ".join(shown)] if shown else []

    def fine_tuning(self) -> tuple[dict[str, float], list[str]]:
        """Further figures of fine-tuning, as values and as text. Empty for pretraining."""
        computed, learned = self.computed, self.learned
        if computed.tokens == computed.places:
            return {}, []
        packing = computed.real_tokens / computed.places
        share = computed.tokens / max(computed.real_tokens, 1)
        values = {"packing_efficiency": packing, "supervised_share": share}
        texts = [f"{100 * share:.1f} % supervised", f"{100 * (1 - packing):.1f} % padding"]
        answers = learned.tokens - learned.think_tokens
        if learned.think_tokens and answers:
            values["think_loss"] = learned.think_loss / learned.think_tokens
            values["answer_loss"] = (learned.token_loss - learned.think_loss) / answers
            texts.append(f"think {values['think_loss']:.4f}, answer {values['answer_loss']:.4f}")
        return values, texts


class Reporter:
    """Collects steps and reports every `interval` of them.

    Args:
        devices: number of devices of the job; rates are per device.
        first, last: step before this run, and its last step.
        names: names of the metrics beside the loss.
        folder: folder of metrics.jsonl and tensorboard events; None for the console only.
        tells_times: print the shares of the time after each line.
        verdict: the plan, or None.
        trackers: services that receive the numbers, too; on rank 0.
    """

    def __init__(
        self,
        platform: Platform,
        arch: Qwen3Arch,
        *,
        devices: int,
        interval: int,
        first: int,
        last: int,
        folder: Path | None,
        is_main: bool,
        names: Sequence[str] = (),
        tells_times: bool = False,
        verdict: PlanVerdict | None = None,
        trackers: Sequence[Tracked] = (),
    ) -> None:
        self.names = names
        self.platform, self.arch, self.devices, self.interval, self.last = platform, arch, devices, interval, last
        self.peak = platform.peak_flops()
        self.window, self.is_nominal_told = _LogInterval(), False
        self.records = Records(folder, first) if folder is not None and is_main else None
        self.trackers = trackers
        self.tells_times = tells_times
        self.entries: list[LedgerEntry] = []  # ledger entries of this run
        self.planned: PlannedMeasured | None = None
        if verdict is not None and is_main:
            self.planned = PlannedMeasured(platform, verdict, self.entries, write=self._record, tell=log.info)

    def is_due(self, iteration: int) -> bool:
        """Whether the step `iteration` ends with a line."""
        return iteration % self.interval == 0 or iteration == self.last

    def step(self, iteration: int, result: StepResult, load: ExpertLoad | None = None) -> None:
        """Count one training step; it is `iteration` (from 1).

        Args:
            load: of the experts since the last line; only where `is_due`.
        """
        self.window.add(result)
        if result.skipped:
            self._write(iteration, {"skipped": 1.0})
        if result.spike:
            self._write(iteration, {"spike": 1.0})
        self._write(iteration, {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.learning_rate})
        if self.is_due(iteration):
            self._line(iteration, result, load)
        if self.planned is not None:
            self.planned.step(iteration, result.tally.places)
            if self.is_due(iteration):
                self.planned.synchronized(iteration)

    def ledger(self, iteration: int, record: Mapping[str, Any]) -> None:
        """Write a record of the time by phase: to metrics.jsonl, and to tensorboard as shares and a line of ranks."""
        if self.tells_times:
            log.info(f"step {iteration} | {shares_line(record['seconds'], record['mean'])}")
        if self.records is None:
            return
        self._record(iteration, {"ledger": record})
        self.entries.append(entry_of(iteration, schema.record(dict(record), "ledger"), "ledger"))

        def events(writer: SummaryWriter) -> None:
            for kind, seconds in record["mean"].items():
                writer.add_scalar(f"time/{kind}", seconds / max(record["seconds"], 1e-12), iteration)
            if record["ranks"] == 1:
                return
            # Imported here: it takes as long as tensorboard itself.
            from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

            line = heat(record["work"])
            image = {
                "height": line.shape[0],
                "width": line.shape[1],
                "colorspace": 3,
                "encoded_image_string": png(line),
            }
            assert writer.file_writer is not None
            writer.file_writer.add_summary(
                Summary(value=[Summary.Value(tag="time/own work by rank", image=Summary.Image(**image))]), iteration
            )

        self.records.events(events)

    def went_back(self, step: int, to: int) -> None:
        """Report a rollback: after a spike or silent corruption at `step` the training continues after step `to`."""
        self._write(step, {"rolled_back_to": float(to)})
        self.window = _LogInterval()

    def _line(self, iteration: int, result: StepResult, load: ExpertLoad | None) -> None:
        self.platform.synchronize()
        window = self.window
        elapsed = time.perf_counter() - window.start
        seconds, per_device_second = elapsed / window.steps, self.devices * elapsed
        real = window.computed.real_tokens
        tokens, supervised = real / per_device_second, window.computed.tokens / per_device_second
        # A token attends to its own document only; this is the mean length of documents, weighted by tokens.
        flops = tokens * flops_per_token(self.arch, window.computed.squares / max(real, 1))
        more, texts = window.preference(self.names) if self.names else window.fine_tuning()
        if load is not None:
            more |= load.values()
            texts.append(str(load))
            for number, tokens_of in zip(load.layers, load.tokens, strict=True):
                self._bars(iteration, f"moe/load_layer_{number:03d}", tokens_of)
        memory = self.platform.memory_peak() / 2**30
        width = len(str(self.last))
        parts = [
            f"step {iteration:>{width}}/{self.last}",
            f"loss {window.loss / window.learned_steps:.6f}" if window.learned_steps else "every update skipped",
            f"grad norm {result.grad_norm:.4f}",
            f"lr {result.learning_rate:.4e}",
            f"{human(tokens, 'tokens/s')}/device",
            *self._nominal(per_device_second),
            *texts,
            f"{human(flops, 'FLOP/s')}/device",
        ]
        rates = {
            "tokens_per_s_per_device": tokens,
            "supervised_tokens_per_s_per_device": supervised,
            "tflops_per_device": flops / 1e12,
            "memory_gib": memory,
        }
        if self.peak:
            parts.append(f"MFU {100 * flops / self.peak:.1f} %")
            rates["mfu"] = flops / self.peak
        parts += [f"{memory:.2f} GiB", f"{seconds:.3g} s/step", f"{duration((self.last - iteration) * seconds)} left"]
        log.info(" | ".join(parts))
        self._write(iteration, rates | {"seconds_per_step": seconds} | more)
        self.window = _LogInterval()

    def _nominal(self, per_device_second: float) -> list[str]:
        """The rate with padding, as other programs print it; only in the first line, for comparison."""
        computed = self.window.computed
        if self.is_nominal_told or computed.places == computed.real_tokens:
            return []
        self.is_nominal_told = True
        return [f"({human(computed.places / per_device_second, 'tokens/s')}/device nominal, with padding)"]

    def evaluation(self, iteration: int, split: str, tally: Tally) -> None:
        """Report the loss on another split after `iteration` steps, and the objective's metrics."""
        values = {f"{split}_{name}": value for name, value in means(tally, self.names).items()}
        told = "".join(
            f" | {name} {value:.4f}" for name, value in values.items() if "accuracy" in name or "margin" in name
        )
        log.info(f"step {iteration} | {split} loss {tally.loss:.6f}{told}")
        self._write(iteration, {f"{split}_loss": tally.loss, **values})

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude evaluation and checkpoints from the rates."""
        self.platform.synchronize()
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self.window.start += seconds
        if self.planned is not None:
            self.planned.pause(seconds)

    def _write(self, iteration: int, values: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(iteration, finite(values))
        if self.records is None:
            return
        # JSON has no NaN.
        self._record(iteration, {name: value if math.isfinite(value) else None for name, value in values.items()})
        # Tools for Megatron's logs look for this name.
        named = values | ({"lm loss": values["loss"]} if "loss" in values else {})

        def scalars(writer: SummaryWriter) -> None:
            for name, value in named.items():
                writer.add_scalar(name, value, iteration)

        self.records.events(scalars)

    def _record(self, iteration: int, values: Mapping[str, Any]) -> None:
        if self.records is not None:
            self.records.line(iteration, values)

    def _bars(self, iteration: int, name: str, values: object) -> None:
        if self.records is not None:
            self.records.events(lambda writer: writer.add_histogram(name, values, iteration))

    def _say_times(self, folder: Path) -> None:
        """Where the time of this run went: a table, a picture, and why it is slow."""
        try:
            for line in report(self.entries, "where the time went", folder / "ledger.png"):
                log.info(line)
        except OSError as error:
            log.warning(f"{folder / 'ledger.png'} cannot be written: {error.strerror}")

    def close(self) -> None:
        if self.entries and self.records is not None:
            self._say_times(self.records.path.parent)
        if self.planned is not None:
            self.planned.close()
        if self.records is not None:
            self.records.close()
        for tracker in self.trackers:
            tracker.close()
