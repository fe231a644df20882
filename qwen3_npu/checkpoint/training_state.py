"""Save and resume a training: weights, optimizer, schedule, random state and data position; atomic, in any layout.

    <root>/iter_0000010/...                        in one of two formats: `training_torch.py`, `training_dist.py`
                       /integrity.json             size and digest of every file
    <root>/config.json, tokenizer files            what the weights are of
    <root>/latest_checkpointed_iteration.txt       written last

A checkpoint is made in `iter_*.partial` and renamed when every rank has finished, so a folder named `iter_*` is whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
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

from qwen3_npu import log
from qwen3_npu.args.training import CheckpointArgs
from qwen3_npu.checkpoint import integrity, keep, optimizer_state, training_dist, training_torch
from qwen3_npu.checkpoint.dist_files import DistReader
from qwen3_npu.checkpoint.hf_files import carry_files, is_hf_weights, open_hf
from qwen3_npu.checkpoint.live import Snapshot, dtype_of, load_weights, on_host, parameters_of, to_torch
from qwen3_npu.checkpoint.lora_table import Contents, Lora
from qwen3_npu.checkpoint.mg_args import lora_args, to_args
from qwen3_npu.checkpoint.mg_files import MegatronReader
from qwen3_npu.checkpoint.mg_folder import TORCH, TORCH_DIST, checkpoint_folder, format_of, iteration_name
from qwen3_npu.checkpoint.newest_whole import newest_whole
from qwen3_npu.checkpoint.outputs import sync_folder
from qwen3_npu.checkpoint.pickles import TensorRef
from qwen3_npu.checkpoint.source import Source, read_shard
from qwen3_npu.checkpoint.tensors import F32, full
from qwen3_npu.checkpoint.training_dist import DistState
from qwen3_npu.checkpoint.training_torch import TorchState
from qwen3_npu.checkpoint.write_hf import write_config
from qwen3_npu.checkpoint.write_mg import CHECKPOINT_VERSION, write_tracker
from qwen3_npu.checkpoint.writing import Writing
from qwen3_npu.distributed.launch import model_rank
from qwen3_npu.distributed.layout import Layout
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch

_FORMATS: dict[str, ModuleType] = {TORCH: training_torch, TORCH_DIST: training_dist}


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
        chunks: the model chunks of this rank, not wrapped.
        lora: the adapter that is trained, if one is.
    """

    arch: Qwen3Arch
    layout: Layout
    chunks: Sequence[torch.nn.Module]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    lora: Lora | None = None

    @property
    def contents(self) -> Contents:
        return Contents(self.arch, lora=self.lora)


def begin_save(
    trained: Trained, position: Position, args: CheckpointArgs, extra: dict[str, Any], config: Path | None
) -> Writing:
    """Write a checkpoint, with --async-save in a thread; `wait` of the result ends it. Every rank must call both.

    Args:
        extra: further entries of the saved args.
        config: folder whose config.json and tokenizer files are carried along.
    """
    root = Path(str(args.save))
    folder = root / iteration_name(position.iteration)
    stage = folder.with_name(folder.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
    writers = _writers(trained.layout.folder(model_rank()))  # nobody writes before rank 0 has made the stage
    snapshot = _snapshot(trained, position, args, extra)
    files, rank = _FORMATS[args.ckpt_format], dist.get_rank()

    def write() -> None:
        if rank in writers:
            integrity.write_part(stage, rank, *files.write(snapshot, stage))

    def publish() -> None:
        parts = integrity.read_parts(stage, writers)
        names = files.finish(snapshot, stage, [part["notes"] for part in parts])
        integrity.write_manifest(stage, parts, names, writers)
        integrity.sync_tree(stage)
        _carry(config, trained, root)
        keep.remove(folder)
        os.replace(stage, folder)
        sync_folder(root)
        write_tracker(root, str(position.iteration))
        if args.save_total_limit is not None:
            keep.keep_newest(root, position.iteration, args.save_total_limit)

    return Writing(str(folder), write, publish if rank == 0 else None, stage, writers, background=args.async_save)


def _writers(folder: str) -> list[int]:
    """The ranks that write: the first of those that hold the same shard."""
    folders: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(folders, folder)
    return [rank for rank, name in enumerate(folders) if folders.index(name) == rank]


def _snapshot(trained: Trained, position: Position, args: CheckpointArgs, extra: dict[str, Any]) -> Snapshot:
    """Everything that is saved of this rank; with --async-save copied to the host."""
    parameters: dict[tuple[int, str], Any] = dict(parameters_of(trained.chunks))
    saved_args = to_args(trained.arch, trained.layout, dtype_of(next(iter(parameters.values()))))
    saved_args |= {"iteration": position.iteration, "consumed_train_samples": position.samples, **extra}
    if trained.lora:
        saved_args |= lora_args(trained.lora)
    gathered = None
    if args.save_optim:
        names = optimizer_state.parameter_names(trained.chunks)
        gathered = optimizer_state.gather(trained.optimizer, names, copy=args.async_save)
    random = None
    if args.save_rng:
        random = {
            "torch_rng_state": torch.get_rng_state(),
            "cuda_rng_state": torch.cuda.get_rng_state(),
            "rng_tracker_states": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
        }
    return Snapshot(
        trained.contents,
        trained.layout,
        model_rank(),
        common={
            "args": argparse.Namespace(**saved_args),
            "checkpoint_version": CHECKPOINT_VERSION,
            "iteration": position.iteration,
            "opt_param_scheduler": trained.scheduler.state_dict(),
        },
        parameters=on_host(parameters) if args.async_save else parameters,
        optimizer=gathered,
        step=optimizer_state.step_count(trained.optimizer),
        random=on_host(random) if args.async_save else random,
    )


def _carry(config: Path | None, trained: Trained, root: Path) -> None:
    if config is not None:
        carry_files(config, root)
    else:
        write_config(trained.arch, None, root, dtype_of(next(trained.chunks[0].parameters())))


def load(trained: Trained, args: CheckpointArgs) -> Position:
    """Take up what --load holds: a Hugging Face model, converted weights, or a training. Every rank must call this.

    Raises:
        UsageError: nothing there (and it is not the folder that this training saves to), or nothing whole.
    """
    if args.load is None:
        log.info("weights: random (no --load)")
        trained.optimizer.reload_model_params()
        return Position()
    if is_hf_weights(args.load):
        source = open_hf(args.load)
        _load_weights(trained, source, args.load)
        source.close()
        trained.optimizer.reload_model_params()
        log.info(f"weights: {args.load} (Hugging Face)")
        return Position()
    found = newest_whole(args.load, args.ckpt_step)
    if found is None:
        if args.exit_on_missing_checkpoint or args.load != args.save:
            raise UsageError(f"--load {args.load} holds no checkpoint and no Hugging Face model")
        log.info(f"weights: random ({args.load} holds no checkpoint yet)")
        trained.optimizer.reload_model_params()
        return Position()
    state = _open(args.load, found)
    _load_weights(trained, state.weights, args.load)
    position = _resume(trained, args, state)
    state.close()
    return position


def _open(load: str, iteration: int | str) -> TorchState | DistState:
    number = iteration if isinstance(iteration, int) else None
    if format_of(checkpoint_folder(load, number)) == TORCH_DIST:
        return DistState(DistReader(load, number))
    return TorchState(MegatronReader(load, number, prefer=model_rank()))


def _load_weights(trained: Trained, source: Source, load: str) -> None:
    if not source.arch.same_weights(trained.arch):
        raise UsageError(f"--load {load} holds {source.arch}; the model is {trained.arch}")
    if source.contents.lora not in (None, trained.lora):
        raise UsageError(f"--load {load} holds {source.contents}; this training has {trained.lora or 'no LoRA'}")
    load_weights(source, trained.layout, model_rank(), trained.chunks, trained.lora)


def _resume(trained: Trained, args: CheckpointArgs, state: TorchState | DistState) -> Position:
    """Everything but the weights."""
    weights_only = "opt_param_scheduler" not in state.common
    if args.finetune or weights_only:
        trained.optimizer.reload_model_params()
        why = "--finetune" if args.finetune else "the checkpoint has weights only"
        log.info(f"weights: {state.folder} ({state.layout}); training starts at step 0: {why}")
        return Position()
    if args.load_optim:
        _load_optimizer(trained, state)
    else:
        trained.optimizer.reload_model_params()
    trained.scheduler.load_state_dict(state.common["opt_param_scheduler"])
    if args.load_rng:
        _load_random(trained, state)
    position = Position(state.common["iteration"], state.common["args"].consumed_train_samples)
    log.info(f"resumed: {state.folder} ({state.layout}) at step {position.iteration}, sample {position.samples}")
    return position


def _load_optimizer(trained: Trained, state: TorchState | DistState) -> None:
    if not state.has_optimizer:
        raise UsageError(f"{state.folder} was saved without optimizer state; give --no-load-optim or --finetune")
    rank = model_rank()
    sources = {key: state.optimizer(key, trained.contents, rank) for key in optimizer_state.KEYS}
    wanted = {(shard.chunk, shard.name): shard for shard in trained.contents.shards(trained.layout, rank)}

    def read(chunk: int, name: str, key: str) -> torch.Tensor:
        return to_torch(read_shard(sources[key], wanted[chunk, name], F32), F32)

    names = optimizer_state.parameter_names(trained.chunks)
    optimizer_state.restore(trained.optimizer, names, state.step, read)
    for source in sources.values():
        source.close()


def _load_random(trained: Trained, state: TorchState | DistState) -> None:
    if state.layout != trained.layout:
        log.info(f"random state: new, since the checkpoint's layout is {state.layout}")
        return
    found = state.random(model_rank())
    if found is None:
        raise UsageError(f"{state.folder} was saved without random state; give --no-load-rng or --finetune")
    content, archive = found

    def tensor(ref: TensorRef) -> torch.Tensor:
        return torch.from_numpy(archive.read(ref, ref.shape, full(ref.shape)))

    torch.set_rng_state(tensor(content["torch_rng_state"]))
    torch.cuda.set_rng_state(tensor(content["cuda_rng_state"]))
    tracker = {name: tensor(ref) for name, ref in content["rng_tracker_states"].items()}
    tensor_parallel.get_cuda_rng_tracker().set_states(tracker)
