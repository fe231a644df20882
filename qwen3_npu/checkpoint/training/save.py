"""Save a training: weights, optimizer, schedule, random state and data position; atomic. `load.py` resumes it.

    <root>/iter_0000010/...                        in one of two formats: `torch_files.py`, `dist_files.py`
                       /integrity.json             size and digest of every file
    <root>/config.json, tokenizer files            what the weights are of
    <root>/latest_checkpointed_iteration.txt       written last

A checkpoint is made in `iter_*.partial` and renamed when every rank has finished, so a folder named `iter_*` is whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from qwen3_npu.args.training import CheckpointArgs
from qwen3_npu.checkpoint import integrity
from qwen3_npu.checkpoint.formats.folders import TORCH, TORCH_DIST, iteration_name
from qwen3_npu.checkpoint.formats.hf_write import write_config
from qwen3_npu.checkpoint.formats.huggingface import CARRIED_FILES, carry_files
from qwen3_npu.checkpoint.formats.megatron_args import lora_args, to_args
from qwen3_npu.checkpoint.formats.torch_write import CHECKPOINT_VERSION, write_tracker
from qwen3_npu.checkpoint.mapping.lora import Contents, is_lora
from qwen3_npu.checkpoint.training import dist_files, optimizer_state, retention, torch_files
from qwen3_npu.checkpoint.training.live import Snapshot, dtype_of, on_host, parameters_of
from qwen3_npu.checkpoint.training.sharded_state import ShardedState
from qwen3_npu.checkpoint.training.writing import Writing
from qwen3_npu.distributed.launch import model_rank
from qwen3_npu.distributed.layout import Layout
from qwen3_npu.files import rename, sync_folder, sync_tree
from qwen3_npu.model.arch import read_hf_config

_FORMATS: dict[str, ModuleType] = {TORCH: torch_files, TORCH_DIST: dist_files}


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a training is.

    Attributes:
        iteration: optimizer steps done.
        samples: training samples consumed.
    """

    iteration: int = 0
    samples: int = 0


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a checkpoint holds the state of.

    Attributes:
        contents: the model's tensors, with those of its LoRA updates.
        chunks: the model chunks of this rank, not wrapped.
    """

    contents: Contents
    layout: Layout
    chunks: Sequence[torch.nn.Module]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    @property
    def optimized(self) -> Contents:
        """The tensors that are trained."""
        return dataclasses.replace(self.contents, base=self.contents.lora is None)


def begin_save(
    trained: Trained,
    position: Position,
    args: CheckpointArgs,
    extra: dict[str, Any],
    config: Path | None,
    adapter_only: bool = False,
) -> Writing:
    """Write a checkpoint, with --async-save in a thread; `wait` of the result ends it. Every rank must call both.

    Args:
        extra: further entries of the saved args.
        config: folder whose config.json and tokenizer files are carried along.
        adapter_only: of a LoRA training, not the frozen weights (--lora-ckpt-filter).
    """
    root = Path(str(args.save))
    folder = root / iteration_name(position.iteration)
    stage = folder.with_name(folder.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
    writers = _writers(trained.layout.folder(model_rank()))  # nobody writes before rank 0 has made the stage
    files, rank = _FORMATS[args.ckpt_format], dist.get_rank()
    snapshot, sharded = _snapshot(trained, position, args, extra, adapter_only, writes=rank in writers)

    def put(writing: Writing) -> None:
        if sharded is not None:
            sharded.put(stage)

    def write(writing: Writing) -> None:
        held = snapshot
        if sharded is not None:
            if not writing.wait_for(sharded.awaited()):
                return
            held = dataclasses.replace(snapshot, optimizer=sharded.collect(stage))
        if rank in writers:
            integrity.write_part(stage, rank, *files.write(held, stage))

    def publish() -> None:
        parts = integrity.read_parts(stage, writers)
        names = files.finish(snapshot, stage, [part["notes"] for part in parts])
        integrity.write_manifest(stage, parts, names, writers)
        sync_tree(stage)
        _carry(config, trained, root)
        retention.move_to_backup(folder)
        rename(stage, folder)
        sync_folder(root)
        write_tracker(root, str(position.iteration))
        retention.clear(root)
        if args.save_total_limit is not None:
            retention.keep_newest(root, position.iteration, args.save_total_limit)

    return Writing(
        str(folder), (put, write), publish if rank == 0 else None, stage, writers, background=args.async_save
    )


def _writers(folder: str) -> list[int]:
    """The ranks that write: the first of those that hold the same shard."""
    folders: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(folders, folder)
    return [rank for rank, name in enumerate(folders) if folders.index(name) == rank]


def _snapshot(
    trained: Trained,
    position: Position,
    args: CheckpointArgs,
    extra: dict[str, Any],
    adapter_only: bool,
    *,
    writes: bool,
) -> tuple[Snapshot, ShardedState | None]:
    """Everything that is saved of this rank; with --async-save copied to the host, and not gathered yet.

    Args:
        writes: this rank writes files of its own.
    """
    contents = trained.optimized if adapter_only else trained.contents
    saved_args = to_args(contents.arch, trained.layout, dtype_of(next(trained.chunks[0].parameters())))
    if contents.lora:
        saved_args |= lora_args(contents.lora)
    saved_args |= {"iteration": position.iteration, "consumed_train_samples": position.samples, **extra}
    parameters: dict[tuple[int, str], Any] = {
        place: parameter
        for place, parameter in parameters_of(trained.chunks).items()
        if contents.base or is_lora(place[1])
    }
    gathered, sharded = None, None
    names = optimizer_state.parameter_names(trained.chunks)
    if args.save_optim and args.async_save and optimizer_state.is_distributed(trained.optimizer):
        sharded = ShardedState(trained.optimizer, names)
    elif args.save_optim:
        gathered = optimizer_state.gather(trained.optimizer, names, copy=args.async_save)
    random = None
    if args.save_rng:
        random = {
            "torch_rng_state": torch.get_rng_state(),
            "cuda_rng_state": torch.cuda.get_rng_state(),
            "rng_tracker_states": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
        }
    snapshot = Snapshot(
        contents,
        trained.layout,
        model_rank(),
        common={
            "args": argparse.Namespace(**saved_args),
            "checkpoint_version": CHECKPOINT_VERSION,
            "iteration": position.iteration,
            "opt_param_scheduler": trained.scheduler.state_dict(),
        },
        parameters=on_host(parameters) if args.async_save and writes else parameters,
        optimizer=gathered,
        step=optimizer_state.step_count(trained.optimizer),
        random=on_host(random) if args.async_save else random,
    )
    return snapshot, sharded


def _carry(config: Path | None, trained: Trained, root: Path) -> None:
    """Tokenizer files as they are; a config.json that says what was trained, which the flags may have changed."""
    held = None
    if config is not None:
        carry_files(config, root, [name for name in CARRIED_FILES if name != "config.json"])
        held = read_hf_config(config) if (config / "config.json").is_file() else None
    write_config(trained.contents.arch, held, root, dtype_of(next(trained.chunks[0].parameters())))
