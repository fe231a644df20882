"""Process groups, model-parallel groups and seeds; always destroyed at the end, also after an error."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import random
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from qwen3_npu.args.parallel import ParallelArgs, RuntimeArgs
from qwen3_npu.distributed import environment
from qwen3_npu.distributed.layout import Layout, Rank, check_world_size
from qwen3_npu.distributed.pipeline import introduce_stages
from qwen3_npu.errors import UsageError
from qwen3_npu.platform.base import Platform
from qwen3_npu.watch.flight import flight_files, record_flights, remove_flights

# torch 2.7 ends a process group with the interpreter locked and joins gloo's threads, which may wait for that lock
# themselves, to let go of their last tensors. A backend ends unlocked: those of ended groups are held here until
# nothing
# holds the group.
_ended_backends: list[object] = []


@dataclasses.dataclass(frozen=True)
class World:
    """The rank of this process, and its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device


@contextlib.contextmanager
def process_group(platform: Platform, runtime: RuntimeArgs) -> Iterator[World]:
    """Join the job's other processes. Without torchrun the job is this process alone."""
    rank, size, local_rank = environment.ranks()
    if runtime.deterministic:
        platform.be_deterministic()
    device = platform.bind(local_rank)
    timeout = datetime.timedelta(minutes=runtime.distributed_timeout_minutes)
    if environment.has_rendezvous():
        environment.check_meeting(first=False)  # torch prints the stack of its store before it gives up
        if platform.flight_recorder is not None:
            record_flights(platform.flight_recorder)
        # torchrun with a fixed --master-port keeps one store for all restarts; what the processes of an earlier start
        # left in it (addresses, ids of communicators) makes those of the next start wait for them forever.
        try:
            store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=timeout))
        except (OSError, RuntimeError) as error:
            raise UsageError(environment.no_meeting(str(error))) from None
        store = dist.PrefixStore(f"start_{environment.restarts()}", store)
        dist.init_process_group(platform.backend, timeout=timeout, store=store, rank=rank, world_size=size)
    else:
        dist.init_process_group(platform.backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(rank, size, local_rank, device)
    finally:
        _end(dist.group.WORLD)
        _ended_backends.clear()
        remove_flights(flight_files(platform.flight_recorder, rank))


@contextlib.contextmanager
def model_parallel(layout: Layout, parallel: ParallelArgs, runtime: RuntimeArgs) -> Iterator[None]:
    """megatron's groups for a layout, and seeds.

    Raises:
        UsageError: the number of processes does not fit the layout.
    """
    from megatron.core import parallel_state

    _ended_backends.clear()
    check_world_size(layout, dist.get_world_size(), parallel.context_parallel_size)
    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        distributed_timeout_minutes=runtime.distributed_timeout_minutes,  # else each of its groups waits 30 minutes
        create_gloo_process_groups=True,  # the optimizer's state is gathered on the host for checkpoints
    )
    try:
        set_seeds(runtime)
        stages = parallel_state.get_pipeline_model_parallel_group()
        introduce_stages(stages, torch.cuda.current_device(), batched=parallel.batches_p2p)
        yield
    finally:
        # megatron forgets its groups and ends only some; each keeps threads, and a process may train more than once.
        listed = parallel_state._global_process_group_list or ()
        groups = [group for group in listed if isinstance(group, dist.ProcessGroup)]
        parallel_state.destroy_model_parallel()
        for group in groups:
            with contextlib.suppress(ValueError):  # ended already
                _end(group)


def _end(group: dist.ProcessGroup | None) -> None:
    assert group is not None
    with contextlib.suppress(RuntimeError):  # none for the host
        _ended_backends.append(group._get_backend(torch.device("cpu")))
    dist.destroy_process_group(group)


def set_seeds(runtime: RuntimeArgs) -> None:
    """Seed every generator: pipeline stages differ, TP ranks differ inside the RNG tracker, DP ranks agree."""
    from megatron.core import parallel_state, tensor_parallel

    seed = runtime.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    if runtime.deterministic:
        torch.use_deterministic_algorithms(True)


def model_rank() -> Rank:
    """Which model shard this process holds."""
    from megatron.core import parallel_state as groups

    return Rank(
        groups.get_tensor_model_parallel_rank(),
        groups.get_pipeline_model_parallel_rank(),
        groups.get_expert_model_parallel_rank(),
        groups.get_expert_tensor_parallel_rank(),
    )
