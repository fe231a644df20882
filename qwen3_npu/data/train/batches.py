"""From samples to the micro-batches of one rank. The order is a function of the step alone, for any number of ranks."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping

import torch

from qwen3_npu.model.sequence import TokenSequence

_ALIGNED = 512  # bytes: tensors begin where an allocator would let them begin


@dataclasses.dataclass(frozen=True)
class AnswerTokens:
    """The answer to which each token of a micro-batch of preference training belongs; see `rows.AnswerRows`.

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
class MicroBatch:
    """One micro-batch on the device: the tensors that this pipeline stage needs.

    Attributes:
        tokens: [b, s] int64; None after the first stage.
        labels: [b, s] int64, shifted already: labels[i] follows tokens[i]. None before the last stage, as `loss_mask`,
            `think_mask`, `amounts` and `answers`.
        loss_mask: [b, s] float32; 1 where the label is supervised.
        sequence: positions and documents.
        think_mask: [b, s] float32; 1 where the label belongs to a thought. None if they are not told apart.
        amounts: [3] float32, this rank's share of the micro-batch: tokens that are no padding, all places, and
            `Rows.squares`.
        supervised: sum of the loss mask over the whole micro-batch, known to the host.
        answers: of preference training.
    """

    tokens: torch.Tensor | None
    labels: torch.Tensor | None
    loss_mask: torch.Tensor | None
    sequence: TokenSequence
    think_mask: torch.Tensor | None
    amounts: torch.Tensor | None
    supervised: float
    answers: AnswerTokens | None = None


def drained(batches: collections.deque[MicroBatch]) -> Iterator[MicroBatch]:
    """The micro-batches in order; each is dropped once it is used."""
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


def moved(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The same tensors on the device, by one asynchronous copy.

    They are views of one buffer on the device, which lives as long as any of them. The buffer on the host is pinned: a
    copy from pageable memory makes the host wait, on an NPU until all earlier operations have finished.
    """
    starts, size = {}, 0
    for name, tensor in tensors.items():
        starts[name] = size
        size += math.ceil(tensor.nbytes / _ALIGNED) * _ALIGNED
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=_is_accelerator(device))

    def views(buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            name: buffer[starts[name] : starts[name] + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for name, tensor in tensors.items()
        }

    for name, view in views(packed).items():
        view.copy_(tensors[name])
    return views(packed.to(device, non_blocking=True))


def fetched(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host, in pinned memory, so the host waits once. (With pageable memory torch_npu waits twice.)"""
    if not _is_accelerator(tensor.device):
        return tensor.cpu()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return copy


def _is_accelerator(device: torch.device) -> bool:
    accelerator = torch.accelerator.current_accelerator()
    return accelerator is not None and device.type == accelerator.type
