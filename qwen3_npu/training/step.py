"""One optimizer step: forward and backward over the micro-batches, gradients reduced, weights updated."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from qwen3_npu.data.train.batches import MicroBatch, fetched
from qwen3_npu.training.guard import NanGuard
from qwen3_npu.training.objective import Objective
from qwen3_npu.training.spikes.detector import SpikeLimits
from qwen3_npu.training.spikes.state import StateCheck
from qwen3_npu.training.update.gradients import Gradients
from qwen3_npu.watch import here


@dataclasses.dataclass(frozen=True)
class Tally:
    """Sums over a global batch; the same on every rank.

    Attributes:
        loss_sum, loss_weight: the step's loss is their ratio.
        token_loss, tokens: losses of the supervised tokens, and their number.
        real_tokens, places: number of tokens that are no padding, and of all computed tokens.
        squares: sum of the squared lengths of the documents.
        think_loss, think_tokens: the supervised tokens that belong to thoughts.
        metrics: sums of an `Objective`'s metrics, over the units that `loss_weight` counts.
    """

    loss_sum: float
    loss_weight: float
    token_loss: float
    tokens: float
    think_loss: float
    think_tokens: float
    real_tokens: float
    places: float
    squares: float
    metrics: tuple[float, ...] = dataclasses.field(default=(), kw_only=True)

    @property
    def loss(self) -> float:
        return self.loss_sum / max(self.loss_weight, 1.0)

    def __add__(self, other: Tally) -> Tally:
        return tally_of([a + b for a, b in itertools.zip_longest(self.numbers(), other.numbers(), fillvalue=0.0)])

    def numbers(self) -> list[float]:
        """All sums in one row."""
        *fixed, metrics = dataclasses.astuple(self)
        return [*fixed, *metrics]


_FIXED = len(dataclasses.fields(Tally)) - 1
NOTHING = Tally(*[0.0] * _FIXED)


def tally_of(numbers: Sequence[float]) -> Tally:
    """The reverse of `Tally.numbers`."""
    return Tally(*numbers[:_FIXED], metrics=tuple(numbers[_FIXED:]))


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every rank.

    Attributes:
        loss: of the global batch, see --loss-normalization.
        grad_norm: of the gradients before clipping.
        learning_rate: the applied learning rate.
        skipped: the update was skipped, because a number is not finite or above the limits.
        wishes: see `Exits.wishes`; true if true on any rank.
        spike: the reason why the step is a spike; set by `Trainer.step`.
        is_damaged: weights or optimizer state changed between updates on some rank; the update was skipped.
    """

    tally: Tally
    grad_norm: float
    learning_rate: float
    skipped: bool = False
    wishes: tuple[bool, ...] = ()
    spike: str | None = None
    is_damaged: bool = False

    @property
    def loss(self) -> float:
        return self.tally.loss


def loss_of(
    batch: MicroBatch, per_token: bool, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The number that backward starts from, megatron's divisor of it, and the numbers of `Tally`.

    Args:
        per_token: megatron divides gradients by the supervised tokens of the whole global batch
            (`calculate_per_token_loss`); else each micro-batch by its own, and by the number of micro-batches.
        losses: [b, s] of this context-parallel rank's tokens.
    """
    assert batch.loss_mask is not None, "only the last stage has losses"
    assert batch.amounts is not None
    total, count = (losses * batch.loss_mask).sum(), batch.loss_mask.sum()
    token_loss = total.detach()
    think_loss = think_tokens = torch.zeros_like(count)
    if batch.think_mask is not None:
        thoughts = batch.think_mask * batch.loss_mask
        think_loss, think_tokens = (losses.detach() * thoughts).sum(), thoughts.sum()
    if per_token:
        divisor, weighted, weight = count, token_loss, count
    else:
        cp = parallel_state.get_context_parallel_world_size()
        divisor = count.clone()
        if cp > 1:
            dist.all_reduce(divisor, group=parallel_state.get_context_parallel_group())
        weighted, weight = token_loss / divisor.clamp(min=1), torch.full_like(count, 1 / cp)
        total = total * cp  # gradients are averaged over context-parallel ranks, too, so the loss is multiplied
    sums = torch.stack((weighted, weight, token_loss, count, think_loss, think_tokens))
    return total, divisor.to(torch.int), torch.cat((sums, batch.amounts))


def objective_loss(
    batch: MicroBatch, objective: Objective, per_token: bool, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `loss_of`, for an objective whose units are not tokens."""
    assert batch.loss_mask is not None, "only the last stage has losses"
    assert batch.amounts is not None
    outcome = objective(batch, losses)
    supervised = losses.detach() * batch.loss_mask
    count = outcome.count * outcome.counted
    nothing = torch.zeros_like(count)
    sums = torch.stack((outcome.total.detach() * outcome.counted, count, supervised.sum(), batch.loss_mask.sum()))
    report = torch.cat((sums, torch.stack((nothing, nothing)), batch.amounts, outcome.metrics * outcome.counted))
    if per_token:
        return outcome.total, count.to(torch.int), report
    # Gradients are averaged over context-parallel ranks, which divide one loss among them.
    return outcome.total * parallel_state.get_context_parallel_world_size(), outcome.count.to(torch.int), report


def forward_step(
    objective: Objective | None, batches: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable]:
    """megatron's callback: run one micro-batch through one model chunk."""
    here.at("data")
    batch = next(batches)
    here.at("forward")
    output = model(batch.tokens, batch.sequence.positions, None, labels=batch.labels, packed_seq_params=batch.sequence)
    here.at("backward")  # or whatever megatron's schedule does next
    per_token = get_model_config(model).calculate_per_token_loss
    if objective is not None:
        return output, functools.partial(objective_loss, batch, objective, per_token)
    return output, functools.partial(loss_of, batch, per_token)


def router_loss_weight(batches: Sequence[MicroBatch], device: torch.device) -> torch.Tensor:
    """The value of `Router.loss_weight` that makes the routers' losses the mean over the micro-batches of a step.

    megatron divides all gradients by the supervised tokens of the global batch. These must be known before the first
    backward pass, hence one small collective per step; nothing waits for it on the host.

    Args:
        batches: this data-parallel rank's micro-batches of the step.

    Returns:
        Supervised tokens of the global batch over its micro-batches, a float32 scalar.
    """
    group = parallel_state.get_data_parallel_group()
    supervised = torch.full((), sum(batch.supervised for batch in batches), dtype=torch.float32, device=device)
    if group.size() > 1:
        dist.all_reduce(supervised, group=group)
    return supervised.clamp(min=1) / (len(batches) * group.size())


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[Iterator[MicroBatch]],
    *,
    num_microbatches: int,
    seq_length: int,
    micro_batch: int,
    forward_only: bool,
    objective: Objective | None = None,
) -> torch.Tensor:
    """Forward (and backward) over all micro-batches of this step.

    Args:
        batches: one iterator per model chunk, over the same micro-batches.
        seq_length, micro_batch: of every micro-batch, unless the configuration says that they differ.
        objective: the objective, if it is not the next token.

    Returns:
        The numbers of a `Tally`, float32 on the device; the host has not waited for them.
    """
    # On a device, autograd computes backward in a thread of its own. Without it a step that waits for the host is
    # faster: 604 to 617 ms instead of 684 to 758 (11 layers of 30B-A3B, 8 micro-batches, one H200).
    with torch.autograd.set_multithreading_enabled(False):
        reports = get_forward_backward_func()(
            forward_step_func=functools.partial(forward_step, objective),
            data_iterator=list(batches) if len(batches) > 1 else batches[0],
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=num_microbatches,
            seq_length=seq_length,
            micro_batch_size=micro_batch,
            forward_only=forward_only,
        )
    device = torch.cuda.current_device()  # a chunk of no-op layers has no parameter that could tell the device
    size = _FIXED + len(objective.names if objective else ())
    total = torch.stack(reports).sum(0) if reports else torch.zeros(size, device=device)
    # Only the last stage has losses; the sum over stages and data-parallel ranks tells every rank.
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return total


def train_step(
    chunks: Sequence[DistributedDataParallel],
    gradients: Gradients,
    scheduler: OptimizerParamScheduler,
    batches: Sequence[Iterator[MicroBatch]],
    *,
    guard: NanGuard,
    num_microbatches: int,
    seq_length: int,
    micro_batch: int,
    global_batch: int,
    objective: Objective | None = None,
    wishes: Sequence[bool] = (),
    limits: SpikeLimits | None = None,
    state: StateCheck | None = None,
) -> StepResult:
    """One step of training. The learning-rate schedule does not advance when the update is skipped.

    The host waits once: for one row with the losses, the norm, whether all numbers are finite, and the `wishes`.

    Args:
        limits: if a number is above its limit on any rank, all ranks skip the update.
        state: the state check; it has recorded the state before the step.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer = gradients.optimizer
    optimizer.zero_grad()
    sums = run_schedule(
        chunks,
        batches,
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch=micro_batch,
        forward_only=False,
        objective=objective,
    )
    here.at("optimizer")
    rate = max((group["lr"] for group in optimizer.param_groups), default=0.0)
    optimizer.prepare_grads()
    norm, divisor = gradients.measure(sums.device)
    # 0, or NaN where a number is not finite; a sum over the ranks keeps NaN (a maximum need not).
    bad = 0 * (sums[0] + sums[1] + norm)
    if limits is not None:
        is_above = (sums[0] > limits.loss * sums[1].clamp(min=1)) | (norm > limits.grad_norm)
        bad = bad.masked_fill(is_above, math.nan)
    changed = [state.changed()] if state is not None and state.before is not None else []
    flags = [bad, *changed, *(torch.full_like(norm, float(wish)) for wish in wishes)]
    everyones = torch.stack(flags)
    dist.all_reduce(everyones)
    *numbers, grad_norm, tokens = fetched(torch.cat((everyones, sums, norm.view(1), divisor.view(1)))).tolist()
    not_well, *told = numbers[: len(flags)]
    tally, skip = tally_of(numbers[len(flags) :]), math.isnan(not_well)
    is_damaged = any(count > 0 for count in told[: len(changed)])
    guard.count(skip)
    if not skip and not is_damaged:
        gradients.update(grad_norm, tokens)
        scheduler.step(increment=global_batch)
    said = tuple(count > 0 for count in told[len(changed) :])
    return StepResult(tally, grad_norm, rate, skip, wishes=said, is_damaged=is_damaged)


def evaluate_step(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[Iterator[MicroBatch]],
    objective: Objective | None = None,
    **sizes: int,
) -> Tally:
    """A global batch without touching the weights."""
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        sums = run_schedule(chunks, batches, forward_only=True, objective=objective, **sizes)
    for chunk in chunks:
        chunk.train()
    return tally_of(sums.tolist())
