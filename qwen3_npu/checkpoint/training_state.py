"""Save a training: weights, optimizer, schedule, random state and data position; atomic. `resume.py` takes it up.

    <root>/iter_0000010/mp_rank_.../model_optim_rng.pt   weights, args, schedule, random state
                                   /optimizer.pt         float32 weights and moments, of the parameters' shapes
    <root>/latest_checkpointed_iteration.txt             written last

A checkpoint is made in `iter_*.partial` and renamed when every rank has finished, so a folder named `iter_*` is whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from qwen3_npu.args.training import CheckpointArgs
from qwen3_npu.checkpoint import optimizer_state
from qwen3_npu.checkpoint.hf_files import carry_files
from qwen3_npu.checkpoint.live import dtype_of, write_content
from qwen3_npu.checkpoint.lora_table import Contents, is_lora
from qwen3_npu.checkpoint.mg_args import lora_args, to_args
from qwen3_npu.checkpoint.mg_files import WEIGHTS
from qwen3_npu.checkpoint.mg_folder import iteration_name
from qwen3_npu.checkpoint.write_hf import write_config
from qwen3_npu.checkpoint.write_mg import CHECKPOINT_VERSION, write_tracker
from qwen3_npu.distributed.launch import model_rank
from qwen3_npu.distributed.layout import Layout
from qwen3_npu.errors import UsageError

OPTIMIZER = "optimizer.pt"


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


def save(
    trained: Trained,
    position: Position,
    args: CheckpointArgs,
    extra: dict[str, Any],
    config: Path | None,
    updates_only: bool = False,
) -> Path:
    """Write a checkpoint. Every rank must call this.

    Args:
        updates_only: of a LoRA training, not the frozen weights (--lora-ckpt-filter).
        extra: further entries of the saved args.
        config: folder whose config.json and tokenizer files are carried along.

    Returns:
        The finished folder.
    """
    root = Path(str(args.save))
    folder = root / iteration_name(position.iteration)
    stage = folder.with_name(folder.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
    dist.barrier()
    names = optimizer_state.parameter_names(trained.chunks)
    gathered = optimizer_state.gather(trained.optimizer, names) if args.save_optim else {}
    mine = trained.layout.folder(model_rank())
    if _writes(mine):
        (stage / mine).mkdir()
        write_content(stage / mine / WEIGHTS, _content(trained, position, args, extra, updates_only))
        if args.save_optim:
            write_content(stage / mine / OPTIMIZER, _optimizer_content(trained.optimizer, gathered))
    dist.barrier()
    if dist.get_rank() == 0:
        _publish(stage, folder, trained, config)
    dist.barrier()
    return folder


def _writes(folder: str) -> bool:
    """Whether this rank is the first of those that hold the same shard."""
    folders: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(folders, folder)
    return folders.index(folder) == dist.get_rank()


def _content(
    trained: Trained, position: Position, args: CheckpointArgs, extra: dict[str, Any], updates_only: bool
) -> dict[str, Any]:
    dtype = dtype_of(next(trained.chunks[0].parameters()))
    saved_args = to_args(trained.contents.arch, trained.layout, dtype)
    if trained.contents.lora:
        saved_args |= lora_args(trained.contents.lora)
    saved_args |= {"iteration": position.iteration, "consumed_train_samples": position.samples, **extra}
    keys = ["model"] if len(trained.chunks) == 1 else [f"model{i}" for i in range(len(trained.chunks))]
    content: dict[str, Any] = {
        "args": argparse.Namespace(**saved_args),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": position.iteration,
        "opt_param_scheduler": trained.scheduler.state_dict(),
    }
    for key, chunk in zip(keys, trained.chunks, strict=True):
        content[key] = {n: p for n, p in chunk.named_parameters() if not updates_only or is_lora(n)}
    if args.save_rng:
        content["rng_state"] = {
            "torch_rng_state": torch.get_rng_state(),
            "cuda_rng_state": torch.cuda.get_rng_state(),
            "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
        }
    return content


def _optimizer_content(
    optimizer: MegatronOptimizer, gathered: dict[tuple[int, str], dict[str, torch.Tensor]]
) -> dict[str, Any]:
    state: dict[str, dict[int, dict[str, torch.Tensor]]] = {key: {} for key in optimizer_state.KEYS}
    for (chunk, name), tensors in gathered.items():
        for key, tensor in tensors.items():
            state[key].setdefault(chunk, {})[name] = tensor
    return {"step": optimizer_state.step_count(optimizer), "state": state}


def _publish(stage: Path, folder: Path, trained: Trained, config: Path | None) -> None:
    """Make a finished checkpoint visible."""
    root = folder.parent
    if config is not None:
        carry_files(config, root)
    else:
        write_config(trained.contents.arch, None, root, dtype_of(next(trained.chunks[0].parameters())))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(stage, folder)
    directory = os.open(root, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    write_tracker(root, str(int(folder.name.removeprefix("iter_"))))


def check_writable(folder: str) -> None:
    """Raises: UsageError: --save cannot be written; found out before training, not at its first checkpoint."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder) / ".probe"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"--save {folder} cannot be written: {error.strerror}") from None
