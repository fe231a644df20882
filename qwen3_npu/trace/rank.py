"""Trace a training step of one rank."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from torch._C._distributed_c10d import FakeWork

from qwen3_npu.args.preference import PREFERENCE_STAGES
from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.checkpoint.training import optimizer_state
from qwen3_npu.data.train.batches import MicroBatch, drained
from qwen3_npu.distributed.launch import World, model_parallel
from qwen3_npu.errors import UsageError
from qwen3_npu.plan.from_args import holds_reference
from qwen3_npu.platform.base import Platform
from qwen3_npu.trace.batches import answers_of, full_batch, rows_of
from qwen3_npu.trace.fused import RecordedProducts
from qwen3_npu.trace.record import Operation, TraceRecorder, modules_named
from qwen3_npu.trace.world import pretended
from qwen3_npu.training import parts
from qwen3_npu.training.loop import Trainer
from qwen3_npu.training.preference import AnswerObjective
from qwen3_npu.training.prepare.plan import TrainingPlan
from qwen3_npu.training.reference import FrozenCopy, WithoutAdapter
from qwen3_npu.training.step import train_step
from qwen3_npu.watch import here


@dataclasses.dataclass(frozen=True)
class RankTrace:
    """The trace of one rank.

    Attributes:
        weights, gradients, optimizer: static bytes.
        start_peak: peak of allocated bytes until model and optimizer are made.
        peak: peak of allocated bytes in the second step, when the optimizer has its state.
        holders: the tensors' owners at the peak, largest first.
        operations, waits: of the second step, as in `TraceRecorder`.
        start: collectives before the first step.
        micro_batches: number of traced micro-batches; a step may have more of the same kind.
        communicators: number of groups with more than one rank that this rank joins at the start.
        groups: ranks -> name, of this rank's groups.
    """

    rank: int
    stage: int
    weights: int
    gradients: int
    optimizer: int
    start_peak: int
    peak: int
    holders: dict[str, int]
    operations: tuple[Operation, ...]
    waits: tuple[tuple[int, int], ...]
    start: tuple[Operation, ...]
    micro_batches: int
    communicators: int
    groups: dict[tuple[int, ...], str]


def trace_rank(platform: Platform, args: PretrainArgs, plan: TrainingPlan, rank: int) -> RankTrace:
    """Run two steps of one rank of the job without data.

    Raises:
        UsageError: this kind of training cannot be traced.
    """
    if args.train.moe_expert_capacity_factor is not None:
        raise UsageError(
            f"--moe-expert-capacity-factor {args.train.moe_expert_capacity_factor} cannot be traced: which tokens are "
            "dropped depends on their data; a plan counts it"
        )
    size = plan.layout.tensor * plan.layout.pipeline * args.parallel.context_parallel_size * plan.data_parallel
    with pretended(rank, size, _routed_rows(args, plan)) as world:
        return traced(recorder_for(args, plan), platform, world, args, plan=plan)


def recorder_for(args: PretrainArgs, plan: TrainingPlan) -> TraceRecorder:
    """A recorder that supplies the numbers that a step reads from tensors without data."""
    group, experts = plan.layout.expert * plan.layout.expert_tensor, max(plan.arch.num_experts, 1)
    rows = _routed_rows(args, plan) * group // experts
    return TraceRecorder(experts=experts, topk=plan.arch.num_experts_per_tok, rows_of_expert=rows)


def traced(
    recorder: TraceRecorder, platform: Platform, world: World, args: PretrainArgs, *, plan: TrainingPlan
) -> RankTrace:
    """The steps of this process, whether or not its tensors have data."""
    with model_parallel(plan.layout, args.parallel, args.runtime), recorder, _noted(recorder):
        trainer = Trainer(platform, world, args, plan)
        if holds_reference(args):
            trainer.reference = FrozenCopy(trainer.another_model())
        elif args.preference.ref_logprobs == "model" and PREFERENCE_STAGES.get(args.data.stage):
            trainer.reference = WithoutAdapter(trainer.chunks)
        try:
            return _steps(recorder, trainer, world)
        finally:
            trainer.close()


def _routed_rows(args: PretrainArgs, plan: TrainingPlan) -> int:
    rows = args.train.micro_batch_size * (2 if args.data.is_preference else 1)
    tokens = args.train.seq_length // args.parallel.context_parallel_size * rows
    sharded = tokens // (plan.layout.tensor if args.parallel.sequence_parallel else 1)
    return sharded * plan.arch.num_experts_per_tok


@contextlib.contextmanager
def _noted(recorder: TraceRecorder) -> Iterator[None]:
    """Let the recorder follow the phases of a step, and storages that recomputation empties and fills."""
    resize = torch.UntypedStorage.resize_

    def at(phase: str) -> None:
        recorder.phase = phase

    def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        out: torch.UntypedStorage = resize(storage, size)
        recorder.resized(storage, size)
        return out

    def noting(wait: Callable) -> Callable:
        def waited(work: dist.Work, *args: object) -> object:
            recorder.waited(work)
            return wait(work, *args)

        return waited

    with (
        mock.patch.object(here, "at", at),
        mock.patch.object(torch.UntypedStorage, "resize_", resized),
        mock.patch.object(dist.Work, "wait", noting(dist.Work.wait)),
        mock.patch.object(FakeWork, "wait", noting(FakeWork.wait)),  # it has its own `wait`
        mock.patch.object(parts, "fused_products", return_value=RecordedProducts(recorder)),
    ):
        yield


def _steps(recorder: TraceRecorder, trainer: Trainer, world: World) -> RankTrace:
    start = tuple(operation for operation in recorder.operations if operation.ranks)
    start_peak, _ = recorder.peak()
    buffers = [buffer for chunk in trainer.chunks for buffer in _buffers(chunk)]
    models: list[torch.nn.Module] = [*trainer.modules]
    models += trainer.reference.chunks if isinstance(trainer.reference, FrozenCopy) else []
    held = [list(module.parameters()) for module in models]
    weights = recorder.relabel([held, [buffer.param_data for buffer in buffers]], "weights")
    gradients = recorder.relabel([buffer.grad_data for buffer in buffers], "gradients")
    count = _micro_batches(trainer)
    with modules_named(recorder, trainer.modules):
        _step(trainer, world, count)
        optimizer = recorder.relabel(_state(trainer), "optimizer")
        recorder.clear()
        first = len(recorder.held)
        _step(trainer, world, count)
    peak, holders = recorder.peak(first)
    return RankTrace(
        rank=world.rank,
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        start_peak=start_peak,
        peak=peak,
        holders=holders,
        operations=tuple(recorder.operations),
        waits=tuple(recorder.waits),
        start=start,
        micro_batches=count,
        communicators=_communicators(),
        groups=_groups(),
    )


def _groups() -> dict[tuple[int, ...], str]:
    """Names of groups. The largest come first, so a group with two names gets the name of the smaller one."""
    named = {
        "all": dist.group.WORLD,
        "expert dp": parallel_state.get_expert_data_parallel_group(),
        "dp with cp": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "dp": parallel_state.get_data_parallel_group(),
        "ep": parallel_state.get_expert_model_parallel_group(),
        "etp": parallel_state.get_expert_tensor_parallel_group(),
        "cp": parallel_state.get_context_parallel_group(),
        "pp": parallel_state.get_pipeline_model_parallel_group(),
        "tp": parallel_state.get_tensor_model_parallel_group(),
    }
    return {tuple(dist.get_process_group_ranks(group)): name for name, group in named.items()}


def _communicators() -> int:
    joined = dist.distributed_c10d._world.pg_group_ranks.values()
    return sum(len(ranks) > 1 for ranks in joined)


def _buffers(chunk: DistributedDataParallel) -> list[_ParamAndGradBuffer]:
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


def _state(trainer: Trainer) -> list[torch.Tensor]:
    """Master weights and moments."""
    model = {id(parameter) for module in trainer.modules for parameter in module.parameters()}
    state: list[torch.Tensor] = []
    for part in optimizer_state.parts(trainer.optimizer):
        for master, moments in part.optimizer.state.items():
            state += [] if id(master) in model else [master]
            state += [moment for moment in moments.values() if torch.is_tensor(moment) and moment.dim()]
    return state


def _micro_batches(trainer: Trainer) -> int:
    """The number of micro-batches that fill the pipeline: memory does not change afterwards.

    Of interleaved passes more: the first forward and the last backward passes are alone.
    """
    stages, chunks = trainer.plan.layout.pipeline, trainer.plan.layout.virtual
    enough = stages * 2 if chunks > 1 else stages + 1
    if trainer.chunks[0].config.overlap_moe_expert_parallel_comm:
        enough = stages * 4
    return min(trainer.plan.num_microbatches, enough)


def _step(trainer: Trainer, world: World, count: int) -> None:
    batches = [full_batch(trainer, world) for _ in range(count)]
    sizes = {"num_microbatches": count, "seq_length": trainer.args.train.seq_length, "micro_batch": rows_of(trainer)}

    def once() -> list[Iterator[MicroBatch]]:
        return [drained(collections.deque(batches)) for _ in trainer.chunks]

    if isinstance(trainer.objective, AnswerObjective) and PREFERENCE_STAGES[trainer.args.data.stage]:
        trainer.objective.references = collections.deque(
            [torch.zeros(answers_of(trainer), device=world.device) for _ in batches]  # as read from a cache
            if trainer.reference is None
            else trainer.reference.log_probs(once(), [()] * count, **sizes)
        )
    train_step(
        trainer.chunks,
        trainer.gradients,
        trainer.scheduler,
        once(),
        guard=trainer.guard,
        objective=trainer.objective,
        global_batch=trainer.plan.global_batch,
        num_microbatches=count,
        seq_length=sizes["seq_length"],
        micro_batch=sizes["micro_batch"],
    )
