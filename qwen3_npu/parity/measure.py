"""Losses and gradients of a few steps of a tiny training, as `pretrain_gpt.py` makes it from its flags."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from qwen3_npu import cli
from qwen3_npu.args.foreign import FOREIGN_TRAINING
from qwen3_npu.args.pretrain import GROUPS, PretrainArgs
from qwen3_npu.data.train.data_path import check_data
from qwen3_npu.distributed.launch import World
from qwen3_npu.parity.gather import gather_whole
from qwen3_npu.platform.base import Platform
from qwen3_npu.training.fingerprints.recorder import StepRecorder
from qwen3_npu.training.loop import Trainer, ready
from qwen3_npu.training.prepare.plan import plan_training
from qwen3_npu.training.step import StepResult


def training_args(flags: Sequence[str]) -> PretrainArgs:
    """The arguments of `pretrain_gpt.py`."""
    return PretrainArgs(*cli.parse("pretrain_gpt.py", "", GROUPS, FOREIGN_TRAINING, argv=list(flags)).groups)


@contextlib.contextmanager
def trainer(
    platform: Platform, world: World, flags: Sequence[str], *, recorder: StepRecorder | None = None
) -> Iterator[Trainer]:
    """A loaded trainer with data."""
    args = training_args(flags)
    plan = plan_training(args, world.size)
    check_data(args.data, plan.arch.vocab_size, seq_length=args.train.seq_length)
    with ready(platform, world, args, plan, recorder=recorder) as made:
        yield made


@dataclasses.dataclass(frozen=True)
class Measured:
    """Results of some steps.

    Attributes:
        gradients: of the first step, clipped by --clip-grad; Hugging Face (or PEFT) name -> float32 array; on
            rank 0 only.
    """

    steps: list[StepResult]
    gradients: dict[str, np.ndarray]


def measure(made: Trainer, steps: int) -> Measured:
    """Train and measure. Every rank must call this."""
    results = [made.step()]
    moments = gather_whole(made.saver.trained, "exp_avg")
    scale = 1 - made.args.optimizer.adam_beta1
    results += [made.step() for _ in range(steps - 1)]
    return Measured(results, {name: moment / scale for name, moment in moments.items()})


def largest_difference(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> tuple[float, str]:
    """The largest difference of any tensor, relative to that tensor's largest element, and its name.

    Raises:
        ValueError: the names of the tensors differ.
    """
    if found.keys() != expected.keys():
        raise ValueError(f"other tensors: {sorted(found.keys() ^ expected.keys())[:5]}")
    worst, where = 0.0, ""
    for name, tensor in expected.items():
        scale = float(np.abs(tensor).max()) or 1.0
        difference = float(np.abs(found[name] - tensor).max()) / scale
        if not difference <= worst:  # written so that NaN counts as the worst
            worst, where = difference, name
    return worst, where
