"""What a micro-batch is trained for: from the losses of its tokens to the number that backward starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch

from qwen3_npu.data.train.batches import MicroBatch


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one micro-batch on one rank.

    Attributes:
        total: scalar, the sum of the losses of its units (tokens or pairs).
        count: scalar, its units.
        counted: 0 on context-parallel ranks whose `total` another rank has as well.
        metrics: [len(Objective.names)] sums over its units.
    """

    total: torch.Tensor
    count: torch.Tensor
    counted: float
    metrics: torch.Tensor


class Objective(Protocol):
    """A loss other than that of the next token.

    Attributes:
        names: of the metrics; means over units are reported.
    """

    names: Sequence[str]

    def __call__(self, batch: MicroBatch, losses: torch.Tensor) -> Outcome:
        """Args: losses: [b, s] float32 of this context-parallel rank's tokens."""
