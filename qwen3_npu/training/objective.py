"""Objectives: from the losses of a micro-batch's tokens to the number that backward starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch

from qwen3_npu.data.train.batches import MicroBatch


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of one micro-batch on one rank.

    Attributes:
        total: scalar, sum of the losses of its units (tokens or pairs).
        count: scalar, number of its units.
        counted: 0 on context-parallel ranks if another rank has the same `total`.
        metrics: [len(Objective.names)] sums over its units.
    """

    total: torch.Tensor
    count: torch.Tensor
    counted: float
    metrics: torch.Tensor


class Objective(Protocol):
    """A loss other than that of the next token.

    Attributes:
        names: names of the metrics; their means over units are reported.
    """

    names: Sequence[str]

    def __call__(self, batch: MicroBatch, losses: torch.Tensor) -> Outcome:
        """Args: losses: [b, s] float32 of this context-parallel rank's tokens."""
