"""Compare the lengths of preferred and other answers: if length tells them apart, a model learns length."""

from __future__ import annotations

import numpy as np

from qwen3_npu import log
from qwen3_npu.data.preprocess.handler import Produced
from qwen3_npu.data.preprocess.sft_handler import LABEL
from qwen3_npu.data.text.encoder import Tokens
from qwen3_npu.data.train.token_record import IGNORED

_BAR = 40
# Length of a chosen answer over that of the rejected one.
_EDGES = (0.5, 0.8, 1.25, 2.0)
_BINS = ("under half as long", "shorter", "about as long", "longer", "over twice as long")


class AnswerLengths:
    """Lengths in tokens of chosen and rejected (or desirable and undesirable) answers, collected block by block."""

    def __init__(self) -> None:
        self.chosen: list[int] = []
        self.rejected: list[int] = []
        self.in_pairs = False

    def add(self, produced: Produced) -> None:
        """The answers of a block; none where its handler makes neither kind."""
        outputs = produced.outputs
        if "packed_chosen_labels" in outputs:
            self.in_pairs = True
            self.chosen += _learned(outputs["packed_chosen_labels"])
            self.rejected += _learned(outputs["packed_rejected_labels"])
        elif LABEL in outputs:
            for count, good in zip(_learned(outputs["packed_answer_labels"]), outputs[LABEL].ids, strict=True):
                (self.chosen if good else self.rejected).append(count)

    def report(self) -> None:
        """Mean lengths, and for pairs a histogram of their ratio."""
        if not self.chosen or not self.rejected:
            return
        chosen, rejected = np.array(self.chosen), np.array(self.rejected)
        names = ("chosen", "rejected") if self.in_pairs else ("desirable", "undesirable")
        means = chosen.mean(), rejected.mean()
        log.info(
            f"answers: {names[0]} {means[0]:.1f} tokens, {names[1]} {means[1]:.1f} on average: "
            f"{means[0] / max(means[1], 1):.2f} times as long"
        )
        if not self.in_pairs:
            return
        counts = np.bincount(np.searchsorted(_EDGES, chosen / np.maximum(rejected, 1), side="right"), minlength=5)
        for name, count in zip(_BINS, counts.tolist(), strict=True):
            log.info(f"  chosen {name:<19} {count:>9} {'#' * -(-_BAR * count // int(counts.max()))}")


def _learned(labels: Tokens) -> list[int]:
    """Supervised tokens of each sample."""
    return [int((part != IGNORED).sum()) for part in labels.split()]
