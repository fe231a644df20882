"""What test worlds can do; each function runs on every rank and returns something for JSON."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from qwen3_npu import cli
from qwen3_npu.args.foreign import FOREIGN
from qwen3_npu.args.pretrain import GROUPS, PretrainArgs
from qwen3_npu.data.prefixes import check_data
from qwen3_npu.distributed.launch import World, model_parallel
from qwen3_npu.platform.base import Platform
from qwen3_npu.training.loop import Trainer
from qwen3_npu.training.plan import make_plan


@contextlib.contextmanager
def trainer(platform: Platform, world: World, flags: list[str]) -> Iterator[Trainer]:
    """A loaded trainer with data, as `pretrain_gpt.py` makes it from these flags."""
    parsed = cli.parse("test", "", GROUPS, FOREIGN, argv=flags)
    args = PretrainArgs(*parsed.groups)
    plan = make_plan(args, world.size)
    fingerprint = check_data(args.data.data_path, plan.arch.vocab_size, instructions=args.data.is_instruction)
    with model_parallel(plan.layout, args.parallel, args.runtime):
        made = Trainer(platform, world, args, plan)
        made.load()
        made.open_data(fingerprint)
        yield made


def train(platform: Platform, world: World, flags: list[str], steps: int) -> dict[str, Any]:
    """Loss and gradient norm of each of `steps` steps; saves a checkpoint at the end if --save is given."""
    with trainer(platform, world, flags) as t:
        results = [t.step() for _ in range(steps)]
        if t.args.checkpoint.save:
            t.saver.save(t.position)
            t.saver.finish()
        return {"loss": [r.loss for r in results], "grad_norm": [r.grad_norm for r in results]}


def dropout_masks(platform: Platform, world: World, flags: list[str]) -> list[list[float]]:
    """What each rank draws inside the tensor-parallel RNG tracker."""
    from megatron.core import tensor_parallel

    with trainer(platform, world, flags), tensor_parallel.get_cuda_rng_tracker().fork():
        mine = torch.nn.functional.dropout(torch.ones(64), 0.5)
        everyone = [torch.empty(64) for _ in range(world.size)]
        dist.all_gather(everyone, mine)
        return [t.tolist() for t in everyone]
