"""Process groups, model-parallel groups and seeds; always torn down, whatever happens."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import random
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from qwen3_npu import log
from qwen3_npu.args.parallel import ParallelArgs, RuntimeArgs
from qwen3_npu.distributed.layout import Layout, Rank
from qwen3_npu.errors import UsageError
from qwen3_npu.platform.base import Platform


@dataclasses.dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    local_rank: int
    device: torch.device


def environment() -> tuple[int, int, int]:
    """Rank, world size and local rank as torchrun sets them; (0, 1, 0) without torchrun."""
    return tuple(int(os.environ.get(n, d)) for n, d in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))  # type: ignore[return-value]


@contextlib.contextmanager
def process_group(platform: Platform, runtime: RuntimeArgs) -> Iterator[World]:
    """Join the job's other processes. Without torchrun the job is this process alone."""
    rank, size, local_rank = environment()
    device = platform.bind(local_rank)
    timeout = datetime.timedelta(minutes=runtime.distributed_timeout_minutes)
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(platform.backend, timeout=timeout)
    else:
        dist.init_process_group(platform.backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(rank, size, local_rank, device)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def model_parallel(layout: Layout, parallel: ParallelArgs, runtime: RuntimeArgs) -> Iterator[None]:
    """megatron's groups for a layout, and seeds.

    Raises:
        UsageError: the number of processes does not fit the layout.
    """
    from megatron.core import parallel_state

    check_world_size(layout, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        layout.virtual if layout.virtual > 1 else None,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        create_gloo_process_groups=False,
    )
    try:
        set_seeds(runtime)
        yield
    finally:
        parallel_state.destroy_model_parallel()


def check_world_size(layout: Layout, world_size: int) -> None:
    """Raises: UsageError: the processes cannot be divided into copies of the model."""
    model = layout.tensor * layout.pipeline
    if world_size % model:
        raise UsageError(
            f"{world_size} processes cannot hold copies of TP {layout.tensor} x PP {layout.pipeline}: start a multiple "
            f"of {model}, or change the parallel sizes"
        )
    experts = layout.expert * layout.expert_tensor * layout.pipeline
    if world_size % experts:
        raise UsageError(
            f"{world_size} processes cannot hold copies of EP {layout.expert} x ETP {layout.expert_tensor} x PP "
            f"{layout.pipeline}: start a multiple of {experts}, or change the parallel sizes"
        )


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


def log_setup() -> None:
    """Rank 0 speaks; the others only warn."""
    rank, size, _ = environment()
    log.setup(rank, size)
