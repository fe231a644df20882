"""From samples to the micro-batches of one rank. The order is a function of the step alone, for any number of ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from qwen3_npu.data.rows import Rows
from qwen3_npu.model.sequence import Sequence as TokenSequence


@dataclasses.dataclass(frozen=True)
class Batch:
    """One micro-batch on the device.

    Attributes:
        tokens, labels: [b, s] int64; labels are shifted already: labels[i] follows tokens[i].
        loss_mask: [b, s] float32; 1 where the label is supervised.
        sequence: positions and documents.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    sequence: TokenSequence


def sample_numbers(
    consumed: int, *, global_batch: int, micro_batch: int, data_parallel: int, data_rank: int
) -> Iterator[range]:
    """The samples of each of this rank's micro-batches in the step that starts after `consumed` samples.

    Micro-batch m of data-parallel rank r is the r-th of the `data_parallel` runs of `micro_batch` samples in round m.
    """
    per_round = micro_batch * data_parallel
    for start in range(consumed + data_rank * micro_batch, consumed + global_batch, per_round):
        yield range(start, start + micro_batch)


def micro_batches(
    dataset: Any,
    numbers: Iterator[range],
    collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]],
    make_sequence: Callable[[torch.Tensor], TokenSequence],
    shard: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    device: torch.device,
) -> Iterator[Batch]:
    """Read, stack, cut and move micro-batches.

    Args:
        make_sequence: positions [b, s] -> what the layers need to know of them.
        shard: this rank's part of the sequences.
    """
    for wanted in numbers:
        fields = collate([dataset[n] for n in wanted])
        tokens = fields["tokens"]
        fields["positions"] = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1)
        fields = {k: v.to(device, non_blocking=True) for k, v in shard(fields).items()}
        yield Batch(fields["tokens"], fields["labels"], fields["loss_mask"], make_sequence(fields["positions"]))


def row_batches(
    dataset: Any,
    numbers: Iterator[range],
    make_rows: Callable[[Sequence[Any]], Rows],
    make_sequence: Callable[[torch.Tensor, tuple[int, ...] | None], TokenSequence],
    shard: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    device: torch.device,
) -> Iterator[Batch]:
    """As `micro_batches`, for rows that know their positions and documents.

    Args:
        make_rows: samples -> `Rows`.
        make_sequence: positions [b, s] of this rank's part and the borders in the whole rows -> what the layers need.
    """
    for wanted in numbers:
        rows = make_rows([dataset[n] for n in wanted])
        names = ("tokens", "labels", "loss_mask", "positions")
        fields = shard({name: torch.from_numpy(getattr(rows, name)) for name in names})
        fields = {name: field.to(device, non_blocking=True) for name, field in fields.items()}
        sequence = make_sequence(fields["positions"], rows.cu_seqlens)
        yield Batch(fields["tokens"], fields["labels"], fields["loss_mask"], sequence)
