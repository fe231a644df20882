"""Cases of preference training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen3_npu.args.preference import PREFERENCE_STAGES
from qwen3_npu.checkpoint.training.save import Position
from qwen3_npu.distributed.launch import World
from qwen3_npu.parity.measure import measure, trainer, training_args
from qwen3_npu.platform.base import Platform
from qwen3_npu.training.feed import open_feed
from qwen3_npu.training.preference import preference_objective
from qwen3_npu.training.prepare.plan import plan_training
from qwen3_npu.training.reference import Reference
from qwen3_npu.training.reports.report import means

# A step that leaves the weights as they are, and the gradient itself as the first moment.
STILL = ["--lr", "1e-30", "--adam-beta1", "0", "--clip-grad", "0", "--lr-decay-style", "constant"]


class Remembered:
    """A reference that is asked once for each data set."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.known: dict[str, list[torch.Tensor]] = {}

    def log_probs(self, batches: Any, samples: Any, **sizes: int) -> list[torch.Tensor]:
        (prefix, _), *_ = samples[0]
        if prefix not in self.known:
            self.known[prefix] = self.reference.log_probs(batches, samples, **sizes)
        return self.known[prefix]


def first_steps(
    platform: Platform, world: World, common: list[str], runs: dict[str, list[str]], folder: str
) -> dict[str, Any]:
    """Loss and metrics of the first step of several trainings; the gradients go to a file each.

    They are of one model, which is built once, with the reference of the first of them.

    Args:
        common: flags of them all.
        runs: name -> flags of one: the loss and the data.
    """
    found = {}
    first, *_ = runs.values()
    with trainer(platform, world, [*common, *STILL, *first]) as t:
        reference = Remembered(t.reference) if t.reference is not None else None
        for name, flags in runs.items():
            t.args = training_args([*common, *STILL, *flags])
            t.plan = plan_training(t.args, world.size)
            t.objective = preference_objective(t.args.data.stage, t.args.preference)
            t.reference = reference if PREFERENCE_STAGES[t.args.data.stage] else None
            t.feed, t.position = open_feed(t.args, t.plan), Position()
            measured = measure(t, 1)
            if world.rank == 0:
                np.savez(Path(folder) / f"{name}.npz", **measured.gradients)
            assert t.objective is not None
            (step,) = measured.steps
            found[name] = {"loss": step.loss, "metrics": means(step.tally, t.objective.names)}
    return found
