"""From samples to the micro-batches of one rank. The order is a function of the step alone, for any number of ranks."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from qwen3_npu.data.train.rows import Rows, ThinkTokens
from qwen3_npu.model.sequence import TokenSequence


@dataclasses.dataclass(frozen=True)
class Answers:
    """Which answer each token of a micro-batch of preference training belongs to; see `rows.AnswerRows`.

    Attributes:
        numbers: [b, s] int64.
        text_mask: [b, s] float32.
        count: answers of the micro-batch.
        desirable: [count / 2] float32; None for pairs.
    """

    numbers: torch.Tensor
    text_mask: torch.Tensor
    count: int
    desirable: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Batch:
    """One micro-batch on the device.

    Attributes:
        tokens, labels: [b, s] int64; labels are shifted already: labels[i] follows tokens[i].
        loss_mask: [b, s] float32; 1 where the label is supervised.
        sequence: positions and documents.
        think_mask: [b, s] float32; 1 where the label belongs to a thought. None if they are not told apart.
        amounts: [3] float32, this rank's share of the micro-batch: tokens that are no padding, all places, and
            `Rows.squares`.
        supervised: sum of the loss mask over the whole micro-batch, known to the host.
        answers: of preference training.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    sequence: TokenSequence
    think_mask: torch.Tensor | None
    amounts: torch.Tensor
    supervised: float
    answers: Answers | None = None


def drained(batches: collections.deque[Batch]) -> Iterator[Batch]:
    """The micro-batches one after the other; none is kept."""
    while batches:
        yield batches.popleft()


def sample_numbers(
    consumed: int, *, global_batch: int, micro_batch: int, data_parallel: int, data_rank: int
) -> Iterator[range]:
    """The samples of each of this rank's micro-batches in the step that starts after `consumed` samples.

    Micro-batch m of data-parallel rank r is the r-th of the `data_parallel` runs of `micro_batch` samples in round m.
    """
    per_round = micro_batch * data_parallel
    for start in range(consumed + data_rank * micro_batch, consumed + global_batch, per_round):
        yield range(start, start + micro_batch)


def row_batches(
    dataset: Any,
    numbers: Iterator[range],
    make_rows: Callable[[Sequence[Any]], Rows],
    make_sequence: Callable[[torch.Tensor, tuple[int, ...] | None], TokenSequence],
    shard: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    device: torch.device,
    think: ThinkTokens | None = None,
    *,
    marks_padding: bool = False,
) -> Iterator[Batch]:
    """Read, arrange, cut and move micro-batches.

    Args:
        make_rows: samples -> `Rows`.
        make_sequence: positions [b, s] of this rank's part and boundaries in the whole rows -> what the layers need.
        shard: this rank's part of [b, s] tensors.
        think: marks of thoughts, if their loss is told apart.
        marks_padding: tell the layers what is padding.
    """
    for wanted in numbers:
        rows = make_rows([dataset[n] for n in wanted])
        arrays = {name: getattr(rows, name) for name in ("tokens", "labels", "loss_mask", "positions")}
        if think is not None:
            arrays["think_mask"] = think.mask(rows.tokens, rows.cu_seqlens)
        if marks_padding and rows.padding is not None:
            arrays["padding"] = rows.padding
        if rows.answers is not None:
            arrays |= {"numbers": rows.answers.numbers, "text_mask": rows.answers.text_mask}
        fields = shard({name: torch.from_numpy(array) for name, array in arrays.items()})
        fields = {name: field.to(device, non_blocking=True) for name, field in fields.items()}
        sequence = make_sequence(fields.pop("positions"), rows.cu_seqlens)
        if "padding" in fields:
            sequence = dataclasses.replace(sequence, padding=fields["padding"])
        share = fields["tokens"].shape[1] / rows.tokens.shape[1]
        answers = None
        if rows.answers is not None:
            desirable = rows.answers.desirable  # whole on every context-parallel rank
            told = None if desirable is None else torch.from_numpy(desirable).to(device, non_blocking=True)
            answers = Answers(fields["numbers"], fields["text_mask"], rows.answers.count, told)
        yield Batch(
            fields["tokens"],
            fields["labels"],
            fields["loss_mask"],
            sequence,
            fields.get("think_mask"),
            torch.tensor([rows.real_tokens * share, rows.tokens.size * share, rows.squares * share], device=device),
            float(rows.loss_mask.sum(dtype=np.float64)),
            answers,
        )
