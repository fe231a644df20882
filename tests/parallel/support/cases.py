"""What test worlds can do; each function runs on every rank and returns something for JSON."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import logging
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

import llama
import tiny
from qwen3_npu import log
from qwen3_npu.args.parallel import ParallelArgs, RuntimeArgs, make_layout
from qwen3_npu.checkpoint.binary import torch_zip_write
from qwen3_npu.checkpoint.formats.dist_keys import key_of, layer_places
from qwen3_npu.checkpoint.mapping.table import shards
from qwen3_npu.checkpoint.training.optimizer_state import named, step_count
from qwen3_npu.distributed import nodes
from qwen3_npu.distributed.launch import World, model_parallel
from qwen3_npu.errors import Stopped, UsageError
from qwen3_npu.files import SealedFile
from qwen3_npu.parity.measure import measure, trainer
from qwen3_npu.platform.base import Platform
from qwen3_npu.trace.activations import activations
from qwen3_npu.training.reports.expert_load import take_expert_load
from qwen3_npu.training.step import evaluate_step

llama.register()


def train(
    platform: Platform, world: World, flags: list[str], steps: int, save_after: int | None = None
) -> dict[str, Any]:
    """Loss, gradient norm and learning rate of `steps` steps; with --save a checkpoint after some (default: all)."""
    with trainer(platform, world, flags) as t:
        results = []
        for number in range(1, steps + 1):
            results.append(t.step())
            if t.args.checkpoint.save and number == (save_after or steps):
                t.saver.save(t.position)
        t.saver.finish()
        return {name: [getattr(r, name) for r in results] for name in ("loss", "grad_norm", "learning_rate")}


def state_bytes(platform: Platform, world: World, flags: list[str]) -> list[int]:
    """Bytes of each rank's float32 weights and moments."""
    with trainer(platform, world, flags) as t:
        found = [0] * world.size
        dist.all_gather_object(found, sum(tensor.nbytes for _, tensor in named(t.optimizer)))
        return found


def train_on_copies(platform: Platform, world: World, flags: list[str], steps: int) -> dict[str, Any]:
    """As `train`, with RANK in the flags replaced by each rank's own."""
    return train(platform, world, [flag.replace("RANK", str(world.rank)) for flag in flags], steps)


def train_per_node(platform: Platform, world: World, flags: list[str], steps: int) -> dict[str, Any]:
    """As `train_on_copies`, each rank as if on a node of its own."""
    with mock.patch.dict(os.environ, {"GROUP_RANK": str(world.rank)}):
        return train_on_copies(platform, world, flags, steps)


def own_folders(platform: Platform, world: World, folders: list[str]) -> str:
    """What is said where these are to be folders of each rank's own node."""
    with mock.patch.dict(os.environ, {"GROUP_RANK": str(world.rank)}):
        try:
            nodes.check_own(Path(folders[world.rank]), "--save")
        except UsageError as error:
            return str(error)
    return ""


def whole_training(platform: Platform, world: World, flags: list[str]) -> None:
    """What `pretrain_gpt.py` does with these flags, to the last checkpoint."""
    with trainer(platform, world, flags) as t:
        t.train()


def uncalled(platform: Platform, world: World, flags: list[str]) -> list[str]:
    """Parameters that a step trains although the module that owns them is never called."""
    called: set[torch.nn.Module] = set()
    with trainer(platform, world, flags) as t:
        for module in t.modules[0].modules():
            module.register_forward_pre_hook(lambda module, _: called.add(module))
        t.step()
        owners = t.modules[0].named_modules()
        missed = [(name, owner) for name, owner in owners if owner not in called]
        return [f"{m}.{n}" for m, o in missed for n, p in o.named_parameters(recurse=False) if p.requires_grad]


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
    """What each rank raises at the end when one of them cannot write its file. No state is gathered by collectives."""
    gathers = mock.patch.object(DistributedOptimizer, "get_parameter_state_dp_zero", side_effect=AssertionError)
    with gathers, trainer(platform, world, flags) as t:
        t.step()
        t.saver.save(t.position)
        t.saver.finish()
        if world.rank == rank:
            torch_zip_write.SealedFile = full_disk  # type: ignore[assignment,misc]
        raised = "nothing"
        try:
            t.step()
            t.saver.save(t.position)
            t.step()
            t.saver.finish()
        except Stopped as error:
            raised = str(error)
        finally:
            torch_zip_write.SealedFile = SealedFile  # type: ignore[misc]
    everyone = [""] * world.size
    dist.all_gather_object(everyone, raised)
    return everyone


def full_disk(path: Path) -> None:
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


def gradients(platform: Platform, world: World, flags: list[str], steps: int, file: str) -> dict[str, Any]:
    """As `train`; the gradients of the first step go to a file.

    Also says whether parameters that are not trained changed.
    """
    with trainer(platform, world, flags) as t:
        frozen = {n: p.detach().clone() for m in t.modules for n, p in m.named_parameters() if not p.requires_grad}
        measured = measure(t, steps)
        if world.rank == 0:
            np.savez(file, **measured.gradients)
        now = {n: p for m in t.modules for n, p in m.named_parameters() if not p.requires_grad}
        return {
            "loss": [r.loss for r in measured.steps],
            "grad_norm": [r.grad_norm for r in measured.steps],
            "frozen": len(frozen),
            "changed": [n for n, before in frozen.items() if not torch.equal(now[n], before)],
        }


def activation_bytes(platform: Platform, world: World, flags: list[str]) -> list[dict[str, int]]:
    """What the activations of a step take on each rank; see `Activations`."""
    with trainer(platform, world, flags) as t:
        t.step()
        with activations() as counted:
            t.step()
        everyone: list[Any] = [None] * world.size
        dist.all_gather_object(everyone, {"kept": counted.kept, "peak": counted.peak})
        return everyone


def expert_load(platform: Platform, world: World, flags: list[str]) -> dict[str, Any]:
    """What the routers did in two steps."""
    with trainer(platform, world, flags) as t:
        t.step()
        t.step()
        load = take_expert_load(t.modules, t.plan.layout.num_layers, t.plan.arch.num_experts)
        return {"tokens": load.tokens.tolist(), "dropped": load.dropped, "balance_loss": load.balance_loss}


def poisoned(platform: Platform, world: World, flags: list[str], rank: int, steps: list[int]) -> list[dict[str, Any]]:
    """Four steps, in some of which one rank finds a NaN among its gradients; what each rank did."""
    with trainer(platform, world, flags) as t:
        reduced = t.optimizer.prepare_grads

        def prepare_grads() -> Any:
            found = reduced()
            if world.rank == rank and t.position.iteration + 1 in steps:
                t.optimizer.get_parameters()[0].grad.view(-1)[0] = float("nan")
            return found

        t.optimizer.prepare_grads = prepare_grads
        mine: dict[str, Any] = {"skipped": [], "changed": [], "stopped": None}
        try:
            for _ in range(4):
                before = [p.detach().clone() for m in t.modules for p in m.parameters()]
                result = t.step()
                after = [p for m in t.modules for p in m.parameters()]
                mine["skipped"].append(result.skipped)
                mine["changed"].append(any(not torch.equal(a, b) for a, b in zip(after, before, strict=True)))
        except Stopped as error:
            mine["stopped"] = str(error)
        mine["updates"] = step_count(t.optimizer)
        everyone: list[Any] = [None] * world.size
        dist.all_gather_object(everyone, mine)
        return everyone


def signalled(platform: Platform, world: World, flags: list[str], rank: int, step: int) -> list[int]:
    """The step that each rank stops after when one of them gets SIGUSR1 in step `step`."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        with trainer(platform, world, flags) as t:
            plain = t.step

            def step_with_signal() -> Any:
                if world.rank == rank and t.position.iteration + 1 == step:
                    os.kill(os.getpid(), signal.SIGUSR1)
                return plain()

            t.step = step_with_signal
            t.train()
            everyone = [0] * world.size
            dist.all_gather_object(everyone, t.position.iteration)
            return everyone
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


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
        boundaries: list[int] = []

        def altered(samples: Any) -> Any:
            rows = make_rows(samples)
            boundaries[:] = rows.cu_seqlens
            part = rows.tokens[:, boundaries[changed] : boundaries[changed + 1]]
            part[...] = (part + 7) % 200
            return rows

        for rows in (make_rows, altered):
            t.feed = dataclasses.replace(t.feed, make_rows=rows)
            evaluate_step(t.chunks, t.batches(t.feed.train, 0), **t.sizes)
            seen.append(dict(outputs))
        found = {}
        for name, before in seen[0].items():
            difference = (before - seen[1][name]).abs().amax(dim=(1, 2))
            found[name] = [difference[a:b].max().item() for a, b in itertools.pairwise(boundaries)]
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


def longest_waits(platform: Platform, world: World, flags: list[str]) -> list[float]:
    """The timeout of megatron's groups that rank 0 is in, in seconds; one of them megatron gives none."""
    from megatron.core import parallel_state

    with trainer(platform, world, flags):
        groups = [group for group in parallel_state._global_process_group_list if isinstance(group, dist.ProcessGroup)]
        groups.remove(parallel_state.get_expert_data_parallel_group_gloo())
        return [group._get_backend(world.device).options._timeout.total_seconds() for group in groups]


def busy_ends(platform: Platform, world: World) -> int:
    """Groups whose last transfer has hardly ended when they end."""
    from megatron.core import parallel_state

    parallel, count = ParallelArgs(), 0
    for _ in range(10):
        with model_parallel(make_layout(tiny.arch("untied"), parallel), parallel, RuntimeArgs()):
            groups = [g for g in parallel_state._global_process_group_list if isinstance(g, dist.ProcessGroup)]
            for group in groups:
                dist.all_reduce(torch.ones(1, device=world.device), group=group)
            count += len(groups)
        del group, groups
    return count


def refused_by_nodes(platform: Platform, world: World, folders: list[str], digests: list[str | None]) -> list[str]:
    """What ranks with folders and data of their own are told."""
    said = []
    for check, mine, name in (
        (nodes.check_shared, Path(folders[world.rank]), "--save"),
        (nodes.check_same, digests[world.rank], "--data-path x"),
    ):
        try:
            check(mine, name)
            said.append("")
        except UsageError as error:
            said.append(str(error))
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, said)
    assert all(bool(one) == bool(other) for one, other in zip(everyone[0], everyone[-1], strict=True))
    return everyone[0]
