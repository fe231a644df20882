"""What test worlds can do; each function runs on every rank and returns something for JSON."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qwen3_npu import cli, log
from qwen3_npu.args.foreign import FOREIGN
from qwen3_npu.args.pretrain import GROUPS, PretrainArgs
from qwen3_npu.checkpoint import training_torch
from qwen3_npu.checkpoint.dist_table import key_of, layer_places
from qwen3_npu.checkpoint.live import write_content
from qwen3_npu.checkpoint.weights import shards
from qwen3_npu.data.prefixes import check_data
from qwen3_npu.distributed.launch import World, model_parallel
from qwen3_npu.errors import Stopped, UsageError
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


def train(
    platform: Platform, world: World, flags: list[str], steps: int, save_after: int | None = None
) -> dict[str, Any]:
    """Loss and gradient norm of each of `steps` steps; with --save a checkpoint after some of them (default: all)."""
    with trainer(platform, world, flags) as t:
        results = []
        for number in range(1, steps + 1):
            results.append(t.step())
            if t.args.checkpoint.save and number == (save_after or steps):
                t.saver.save(t.position)
        t.saver.finish()
        return {"loss": [r.loss for r in results], "grad_norm": [r.grad_norm for r in results]}


def checkpoints(platform: Platform, world: World, flags: list[str], steps: int) -> None:
    """A checkpoint after each of `steps` steps."""
    with trainer(platform, world, flags) as t:
        for _ in range(steps):
            t.step()
            t.saver.save(t.position)
        t.saver.finish()


def resumed(platform: Platform, world: World, flags: list[str]) -> dict[str, Any]:
    """Which step a training resumes at and what rank 0 says; "error": what every rank says is wrong."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.LOGGER.addHandler(handler)
    log.LOGGER.setLevel(logging.INFO)
    errors: list[str | None] = [None] * world.size
    error, iteration = None, None
    try:
        with trainer(platform, world, flags) as t:
            iteration = t.position.iteration
    except UsageError as wrong:
        error = str(wrong)
    finally:
        log.LOGGER.removeHandler(handler)
    dist.all_gather_object(errors, error)
    assert len(set(errors)) == 1, f"ranks disagree: {errors}"
    return {"iteration": iteration, "error": error, "said": said}


def failing_save(platform: Platform, world: World, flags: list[str], rank: int) -> list[str]:
    """What each rank raises at the end when one of them cannot write its file."""
    with trainer(platform, world, flags) as t:
        t.step()
        t.saver.save(t.position)
        t.saver.finish()
        if world.rank == rank:
            training_torch.write_content = full_disk  # type: ignore[assignment]
        raised = "nothing"
        try:
            t.step()
            t.saver.save(t.position)
            t.step()
            t.saver.finish()
        except Stopped as error:
            raised = str(error)
        finally:
            training_torch.write_content = write_content
    everyone = [""] * world.size
    dist.all_gather_object(everyone, raised)
    return everyone


def full_disk(path: Path, content: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def megatron_reads(platform: Platform, world: World, flags: list[str], folder: str) -> dict[str, Any]:
    """megatron-core's own loading of a checkpoint must give the parameters that are loaded here."""
    from megatron.core import dist_checkpointing

    with trainer(platform, world, flags) as t:
        tensors = dist_checkpointing.load_plain_tensors(folder)
        common = dist_checkpointing.load_common_state_dict(folder)
        layout = t.plan.layout
        parameters = dict(t.modules[0].named_parameters())
        for shard in shards(t.plan.arch, layout, next(layout.ranks())):
            key, lead = key_of(shard, layer_places(layout))
            assert torch.equal(tensors[key][lead] if lead else tensors[key], parameters[shard.name]), key
            moment = tensors[f"optimizer.state.exp_avg.{key}"]
            assert moment.shape == tensors[key].shape, key
            assert moment.any(), key
        return {"parameters": len(parameters), "iteration": common["iteration"]}


def dropout_masks(platform: Platform, world: World, flags: list[str]) -> list[list[float]]:
    """What each rank draws inside the tensor-parallel RNG tracker."""
    from megatron.core import tensor_parallel

    with trainer(platform, world, flags), tensor_parallel.get_cuda_rng_tracker().fork():
        mine = torch.nn.functional.dropout(torch.ones(64), 0.5)
        everyone = [torch.empty(64) for _ in range(world.size)]
        dist.all_gather(everyone, mine)
        return [t.tolist() for t in everyone]
