"""One optimizer step: forward and backward over the micro-batches, gradients reduced, weights updated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

from qwen3_npu.data.batches import Batch
from qwen3_npu.training.guard import NanGuard
from qwen3_npu.training.optimizer import clip_gradients


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every rank.

    Attributes:
        loss: mean over the supervised tokens of the global batch.
        tokens: supervised tokens of the global batch.
        grad_norm: of the gradients before clipping.
        learning_rate: that was applied.
        skipped: the update was not made, for a number that is not finite.
    """

    loss: float
    tokens: int
    grad_norm: float
    learning_rate: float
    skipped: bool = False


def loss_of(batch: Batch, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of the supervised tokens' losses, their number, and both for the report.

    megatron divides gradients by the number of tokens of the whole global batch (`calculate_per_token_loss`).
    """
    total = (losses * batch.loss_mask).sum()
    count = batch.loss_mask.sum()
    return total, count.to(torch.int), torch.stack((total.detach(), count))


def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
    """megatron's callback: run one micro-batch through one model chunk."""
    batch = next(batches)
    output = model(batch.tokens, batch.sequence.positions, None, labels=batch.labels, packed_seq_params=batch.sequence)
    return output, functools.partial(loss_of, batch)


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[Iterator[Batch]],
    *,
    num_microbatches: int,
    seq_length: int,
    micro_batch: int,
    forward_only: bool,
) -> tuple[float, int]:
    """Forward (and backward) over all micro-batches of this step.

    Args:
        batches: one iterator per model chunk, over the same micro-batches.

    Returns:
        The mean loss over all supervised tokens of the global batch, and their number; the same on every rank.
    """
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=list(batches) if len(batches) > 1 else batches[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch,
        forward_only=forward_only,
    )
    device = next(chunks[0].parameters()).device
    total = torch.stack(reports).sum(0) if reports else torch.zeros(2, device=device)
    # Only the last stage has losses; the sum over stages and data-parallel ranks tells every rank.
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    loss, count = total.tolist()
    return loss / max(count, 1.0), int(count)


def train_step(
    chunks: Sequence[Any],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    batches: Sequence[Iterator[Batch]],
    guard: NanGuard,
    *,
    num_microbatches: int,
    seq_length: int,
    micro_batch: int,
    global_batch: int,
) -> StepResult:
    """One step of training. The schedule of the learning rate does not move when the update is skipped."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    loss, tokens = run_schedule(
        chunks,
        batches,
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch=micro_batch,
        forward_only=False,
    )
    rate = max((group["lr"] for group in optimizer.param_groups), default=0.0)
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    skip = guard.judge(loss, grad_norm, next(chunks[0].parameters()).device)
    if not skip:
        clip_gradients(optimizer, grad_norm)
        optimizer.step_with_ready_grads()
        scheduler.step(increment=global_batch)
    return StepResult(loss, tokens, grad_norm, rate, skip)


def evaluate_step(chunks: Sequence[Any], batches: Sequence[Iterator[Batch]], **sizes: int) -> tuple[float, int]:
    """The loss on a global batch, without touching the weights."""
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        result = run_schedule(chunks, batches, forward_only=True, **sizes)
    for chunk in chunks:
        chunk.train()
    return result
