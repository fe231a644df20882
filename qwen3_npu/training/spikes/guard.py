"""The reaction to a spike: a warning, a skipped update, or a rollback (`--spike-guard`)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch.distributed as dist

from qwen3_npu import log, schema
from qwen3_npu.args.training import CheckpointArgs
from qwen3_npu.args.watch import SpikeArgs
from qwen3_npu.checkpoint.folders import iterations
from qwen3_npu.checkpoint.training.save import Position
from qwen3_npu.data.train import quarantine
from qwen3_npu.data.train.quarantine import LEFT_OUT, NOTED, Ordered, Quarantined
from qwen3_npu.errors import Stopped
from qwen3_npu.files import write_text
from qwen3_npu.training.spikes.detector import Detector, SpikeLimits, reason

HISTORY = "spike_history.json"
TokenDecoder = Callable[[Sequence[int]], str]


class SpikeGuard:
    """Judges steps, and keeps the quarantine of --save.

    Args:
        ceiling: a loss that no trained model has.
    """

    def __init__(self, args: SpikeArgs, checkpoint: CheckpointArgs, ceiling: float) -> None:
        self.args, self.checkpoint = args, checkpoint
        self.detector = Detector(args.spike_sigma, ceiling)
        self.folder = Path(checkpoint.save) if checkpoint.save else None
        self.entries: list[Quarantined] = []
        self.rollbacks, self.last = 0, 0  # number of rollbacks, and the step of the last one
        self.told = -1  # the last step with a warning

    @property
    def is_on(self) -> bool:
        return self.args.spike_guard != "off"

    @property
    def rolls_back(self) -> bool:
        return self.args.spike_guard == "rollback"

    @property
    def limits(self) -> SpikeLimits | None:
        """The limits with which ranks compare the next step before its update; None if they do not compare."""
        return self.detector.limits() if self.is_on else None

    def judge(self, step: int, loss: float, grad_norm: float, *, skipped: bool) -> str | None:
        """Record a step. Returns the reason why it is a spike, or None.

        Args:
            skipped: its update was skipped on all ranks.
        """
        why = reason(loss, grad_norm, self.detector.limits())
        if skipped:
            return why or "another rank saw it"
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.detector.add(step, loss, grad_norm)
        if why is not None:
            if self.told != step - 1:  # a loss that stays high is warned of once
                log.warning_once(f"step {step}: spike: {why}; see --spike-guard")
            self.told = step
        return why

    def read(self, position: Position) -> int:
        """Read the quarantine and the history in --save. Every rank must call this.

        Returns:
            Number of omitted samples.
        """
        load = Path(self.checkpoint.load) if self.checkpoint.load and not self.checkpoint.finetune else None
        held: list[object] = [[], []]
        if dist.get_rank() == 0:
            read = {folder.resolve(): quarantine.read(folder) for folder in (load, self.folder) if folder is not None}
            held = [list(dict.fromkeys(one for entries in read.values() for one in entries)), self._history()]
        dist.broadcast_object_list(held, 0)
        entries, history = held
        assert isinstance(entries, list)
        assert isinstance(history, list)
        self.entries = entries
        self.detector.restore(history, position.iteration)
        return sum(one.action == LEFT_OUT for one in entries)

    def leave_out(self, train: Ordered) -> None:
        """Omit the samples in quarantine. Every rank must call this."""
        quarantine.warn(train.resolve(self.entries))
        if train.rules:
            log.info(f"quarantine: {len(train.rules)} samples are left out, see {quarantine.FILE}")
            if dist.get_rank() == 0 and self.folder is not None:  # the entries may come from --load
                self.folder.mkdir(parents=True, exist_ok=True)
                quarantine.write(self.folder, self.entries)

    def _history(self) -> list[list[float]]:
        if self.folder is None or not (path := self.folder / HISTORY).is_file():
            return []
        rows = schema.sequence(schema.read_json(path), str(path))
        return [[schema.number(value, str(path)) for value in schema.sequence(row, str(path))] for row in rows]

    def keep_history(self) -> None:
        """Store the history beside a checkpoint, on rank 0."""
        if self.folder is not None and self.is_on and dist.get_rank() == 0:
            write_text(self.folder / HISTORY, json.dumps([list(one) for one in self.detector.seen]))

    def note(self, train: Ordered, before: Position, count: int, *, why: str, decode: TokenDecoder | None) -> None:
        """Write the samples of a step whose update was skipped; with rollback they are omitted from now on.

        Args:
            before: the position before the step, `count` its samples.
        """
        numbers = [train.raw(number) for number in range(before.samples, before.samples + count)]
        action = LEFT_OUT if self.rolls_back else NOTED
        if dist.get_rank() == 0 and self.folder is not None:
            fields = {"step": before.iteration + 1, "reason": why, "first": numbers[0], "action": action}
            self.entries += [train.entry(number, decode, **fields) for number in numbers]
            quarantine.write(self.folder, self.entries)
        if self.rolls_back:
            train.leave_out(numbers, numbers[0])

    def way_back(self, before: Position, own: Collection[int], why: str) -> int:
        """The step of the checkpoint for a rollback. Every rank must call this.

        Args:
            own: steps of the checkpoints that this training has saved or started from.

        Raises:
            Stopped: there were too many rollbacks, or there is no checkpoint.
        """
        self.rollbacks += 1
        step = before.iteration + 1
        if self.rollbacks > self.args.max_rollbacks:
            raise Stopped(
                f"step {step}: {why}; {self.args.max_rollbacks} rollbacks have been made, as many as "
                f"--max-rollbacks allows; look at {self.folder}/{quarantine.FILE}, at --lr, or at the machine"
            )
        # A spike at the same place as the last one: its cause is older than that checkpoint.
        again = self.last and step <= self.last + 2
        self.last = step
        assert self.folder is not None
        found = [
            [it for it in iterations(self.folder) if it in own and it <= before.iteration]
            if dist.get_rank() == 0
            else []
        ]
        dist.broadcast_object_list(found, 0)
        if not found[0]:
            raise Stopped(f"step {step}: {why}; {self.folder} holds no checkpoint to go back to")
        target = found[0][min(1, len(found[0]) - 1) if again else 0]
        log.warning_once(f"step {step}: {why}; back to step {target}")
        return int(target)
