"""What test worlds can do; each function runs on every rank and returns something for JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from qwen3_npu import cli
from qwen3_npu.args.foreign import FOREIGN
from qwen3_npu.args.pretrain import GROUPS, PretrainArgs
from qwen3_npu.checkpoint.whole import gather_whole
from qwen3_npu.data.prefixes import check_data
from qwen3_npu.distributed.launch import World, model_parallel
from qwen3_npu.platform.base import Platform
from qwen3_npu.training.loop import Trainer
from qwen3_npu.training.plan import make_plan
from qwen3_npu.training.step import evaluate_step


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


def finetune(
    platform: Platform, world: World, flags: list[str], steps: int, gradients: str, weights: str | None = None
) -> dict[str, Any]:
    """As `train`; the gradients of the first step go to a file, and so may the trained weights after the last one.

    Also says whether parameters that are not trained changed. For --clip-grad 0.
    """
    with trainer(platform, world, flags) as t:
        trained = t.saver.trained
        frozen = {n: p.detach().clone() for m in t.modules for n, p in m.named_parameters() if not p.requires_grad}
        results = [t.step()]
        whole = gather_whole(trained, "exp_avg")
        results += [t.step() for _ in range(steps - 1)]
        last = gather_whole(trained, "param") if weights else {}
        if world.rank == 0:
            np.savez(gradients, **{name: a / (1 - t.args.optimizer.adam_beta1) for name, a in whole.items()})
            if weights:
                np.savez(weights, **last)
        now = {n: p for m in t.modules for n, p in m.named_parameters() if not p.requires_grad}
        return {
            "loss": [r.loss for r in results],
            "tokens": [r.tally.tokens for r in results],
            "grad_norm": [r.grad_norm for r in results],
            "frozen": len(frozen),
            "changed": [n for n, before in frozen.items() if not torch.equal(now[n], before)],
        }


def packing_isolation(platform: Platform, world: World, flags: list[str], changed: int) -> list[dict[str, list[float]]]:
    """What a change in document `changed` of a pack changes in the outputs of every layer, on every rank.

    Returns:
        For each rank, layer -> largest difference in each document.
    """
    with trainer(platform, world, flags) as t:
        outputs: dict[str, torch.Tensor] = {}
        for chunk, module in enumerate(t.modules):
            for number, layer in enumerate(module.decoder.layers):
                layer.register_forward_hook(
                    lambda m, i, out, name=f"chunk {chunk} layer {number}": outputs.update({name: out[0].detach()})
                )
        assert t.feed is not None
        make_rows, seen = t.feed.make_rows, []
        borders: list[int] = []

        def altered(samples: Any) -> Any:
            rows = make_rows(samples)
            borders[:] = rows.cu_seqlens
            part = rows.tokens[:, borders[changed] : borders[changed + 1]]
            part[...] = (part + 7) % 200
            return rows

        for rows in (make_rows, altered):
            t.feed = dataclasses.replace(t.feed, make_rows=rows)
            evaluate_step(t.chunks, t.batches(t.feed.train, 0), **t.sizes)
            seen.append(dict(outputs))
        found = {}
        for name, before in seen[0].items():
            difference = (before - seen[1][name]).abs().amax(dim=(1, 2))
            found[name] = [difference[a:b].max().item() for a, b in itertools.pairwise(borders)]
        everyone: list[Any] = [None] * world.size
        dist.all_gather_object(everyone, found)
        return everyone


def dropout_masks(platform: Platform, world: World, flags: list[str]) -> list[list[float]]:
    """What each rank draws inside the tensor-parallel RNG tracker."""
    from megatron.core import tensor_parallel

    with trainer(platform, world, flags), tensor_parallel.get_cuda_rng_tracker().fork():
        mine = torch.nn.functional.dropout(torch.ones(64), 0.5)
        everyone = [torch.empty(64) for _ in range(world.size)]
        dist.all_gather(everyone, mine)
        return [t.tolist() for t in everyone]
