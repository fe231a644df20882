"""What the plan of a training (`plan`) expects of one more flag, for causes that `why` names. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from qwen3_npu.distributed.layout import exchange_pieces
from qwen3_npu.plan.device import GIB
from qwen3_npu.plan.setup import Setup
from qwen3_npu.plan.shape import Shape
from qwen3_npu.plan.verdict import PlanVerdict


def gains(verdict: PlanVerdict) -> dict[str, tuple[str, float]]:
    """Cause -> the change that brings most, in words, and the share of a token's time that it saves.

    A change that fits the device goes before one that does not, whose words say so.
    """
    found: dict[str, tuple[bool, float, str]] = {}
    for cause, words, setup in _changes(verdict.shape, verdict.setup):
        changed = PlanVerdict(verdict.shape, setup, verdict.device)
        share = 1 - _token_seconds(changed) / _token_seconds(verdict)
        if not changed.fits:
            words += f" (which needs {changed.peak / GIB:.1f} GiB of {changed.limit / GIB:.1f})"
        found[cause] = max(found.get(cause, (False, -1.0, "")), (changed.fits, share, words))
    return {cause: (words, max(share, 0.0)) for cause, (_, share, words) in found.items()}


def _token_seconds(verdict: PlanVerdict) -> float:
    return verdict.time.total / (verdict.setup.global_batch * verdict.setup.seq_length)


def _changes(shape: Shape, setup: Setup) -> Iterator[tuple[str, str, Setup]]:
    """Cause, words and what they change, for every flag that this layout lets one add."""
    more = dataclasses.replace(setup, num_microbatches=2 * setup.num_microbatches)
    batch = "twice the --global-batch-size"
    if setup.pipeline > 1:
        yield "few micro-batches", batch, more
        yield from _interleaved(setup)
    if setup.recompute:
        yield "recompute", "no --recompute-granularity full", dataclasses.replace(setup, recompute=0)
    if setup.num_microbatches % 2 == 0:
        passes = setup.num_microbatches // 2
        larger = dataclasses.replace(setup, micro_batch=2 * setup.micro_batch, num_microbatches=passes)
        yield "tiny kernels", "twice the --micro-batch-size", larger
    if setup.data * setup.context > 1:
        for cause in ("wait dp", "wait dp-cp", "wait edp"):
            yield cause, batch, more
            yield from _overlapped(setup, cause)
    yield "optimizer", batch, more
    if setup.data * setup.context > 1 and not (setup.distributed_optimizer or setup.lora_rank):
        sharded = dataclasses.replace(setup, distributed_optimizer=True)
        yield "optimizer", "--use-distributed-optimizer", sharded
    yield from _smaller_groups(shape, setup)
    if setup.tensor > 1 and not (setup.overlap_tensor or setup.quantized):
        yield "wait tp", "--use-ascend-coc", dataclasses.replace(setup, overlap_tensor=True)
    if setup.expert > 1 and not setup.gathered and not setup.overlap_experts:
        if exchange_pieces(shape.num_experts // setup.expert) > 1:
            yield "wait ep", "--moe-alltoall-overlap-comm", dataclasses.replace(setup, overlap_experts=True)
        yield "wait ep", "--moe-token-dispatcher-type allgather", dataclasses.replace(setup, gathered=True)


def _interleaved(setup: Setup) -> Iterator[tuple[str, str, Setup]]:
    """Two chunks a stage, where all have the same even number of layers."""
    numbers = {sum(stage) for stage in setup.layers}
    number = numbers.pop()
    if setup.virtual > 1 or numbers or number % 2 or setup.num_microbatches % setup.pipeline:
        return
    halves = tuple((number // 2, number // 2) for _ in setup.layers)
    words = f"--num-layers-per-virtual-pipeline-stage {number // 2}"
    yield "few micro-batches", words, dataclasses.replace(setup, layers=halves)


def _overlapped(setup: Setup, cause: str) -> Iterator[tuple[str, str, Setup]]:
    if not setup.overlap_grads:
        yield cause, "--overlap-grad-reduce", dataclasses.replace(setup, overlap_grads=True)
    elif setup.distributed_optimizer and not (setup.overlap_params or setup.lora_rank or setup.swap_optimizer):
        yield cause, "--overlap-param-gather", dataclasses.replace(setup, overlap_params=True)


def _smaller_groups(shape: Shape, setup: Setup) -> Iterator[tuple[str, str, Setup]]:
    """Half as many ranks to shard over, and twice as many copies, with the same global batch."""
    if setup.num_microbatches % 2 == 0:
        more = dataclasses.replace(setup, data=2 * setup.data, num_microbatches=setup.num_microbatches // 2)
        if setup.tensor % 2 == 0 and (setup.expert_tensor == 1 or not shape.is_moe):
            words = f"--tensor-model-parallel-size {setup.tensor // 2}"
            yield "wait tp", words, dataclasses.replace(more, tensor=setup.tensor // 2)
        if setup.context % 2 == 0:
            words = f"--context-parallel-size {setup.context // 2}"
            yield "wait cp", words, dataclasses.replace(more, context=setup.context // 2)
    if setup.expert % 2 == 0:
        words = f"--expert-model-parallel-size {setup.expert // 2}"
        yield "wait ep", words, dataclasses.replace(setup, expert=setup.expert // 2)
