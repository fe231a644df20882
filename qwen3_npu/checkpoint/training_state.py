"""Save and resume a training: weights, optimizer, schedule, random state and data position; atomic, in any layout.

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

from qwen3_npu import log
from qwen3_npu.args.training import CheckpointArgs
from qwen3_npu.checkpoint import optimizer_state
from qwen3_npu.checkpoint.hf_files import carry_files, is_hf_weights, open_hf
from qwen3_npu.checkpoint.live import dtype_of, load_weights, to_torch, write_content
from qwen3_npu.checkpoint.mg_args import to_args
from qwen3_npu.checkpoint.mg_files import WEIGHTS, MegatronReader, ShardedTensors, iteration_name, read_tracker
from qwen3_npu.checkpoint.pt_reader import PtFile, TensorRef
from qwen3_npu.checkpoint.source import read_shard
from qwen3_npu.checkpoint.tensors import F32, full
from qwen3_npu.checkpoint.weights import shards
from qwen3_npu.checkpoint.write_hf import write_config
from qwen3_npu.checkpoint.write_mg import CHECKPOINT_VERSION, write_tracker
from qwen3_npu.distributed.launch import model_rank
from qwen3_npu.distributed.layout import Layout
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch

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
        chunks: the model chunks of this rank, not wrapped.
    """

    arch: Qwen3Arch
    layout: Layout
    chunks: Sequence[torch.nn.Module]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def save(
    trained: Trained, position: Position, args: CheckpointArgs, extra: dict[str, Any], config: Path | None
) -> Path:
    """Write a checkpoint. Every rank must call this.

    Args:
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
        write_content(stage / mine / WEIGHTS, _content(trained, position, args, extra))
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


def _content(trained: Trained, position: Position, args: CheckpointArgs, extra: dict[str, Any]) -> dict[str, Any]:
    dtype = dtype_of(next(trained.chunks[0].parameters()))
    saved_args = to_args(trained.arch, trained.layout, dtype)
    saved_args |= {"iteration": position.iteration, "consumed_train_samples": position.samples, **extra}
    keys = ["model"] if len(trained.chunks) == 1 else [f"model{i}" for i in range(len(trained.chunks))]
    content: dict[str, Any] = {
        "args": argparse.Namespace(**saved_args),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": position.iteration,
        "opt_param_scheduler": trained.scheduler.state_dict(),
    }
    for key, chunk in zip(keys, trained.chunks, strict=True):
        content[key] = dict(chunk.named_parameters())
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
        write_config(trained.arch, None, root, dtype_of(next(trained.chunks[0].parameters())))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(stage, folder)
    directory = os.open(root, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    write_tracker(root, str(int(folder.name.removeprefix("iter_"))))


def load(trained: Trained, args: CheckpointArgs) -> Position:
    """Take up what --load holds: a Hugging Face model, converted weights, or a training. Every rank must call this.

    Raises:
        UsageError: nothing there (and it is not the folder that this training saves to), or it is damaged.
    """
    if args.load is None:
        log.info("weights: random (no --load)")
        trained.optimizer.reload_model_params()
        return Position()
    if is_hf_weights(args.load):
        source = open_hf(args.load)
        _check_same_model(source.arch, trained.arch, args.load)
        load_weights(source, trained.layout, model_rank(), trained.chunks)
        source.close()
        trained.optimizer.reload_model_params()
        log.info(f"weights: {args.load} (Hugging Face)")
        return Position()
    if args.ckpt_step is None and read_tracker(Path(args.load)) is None:
        if args.exit_on_missing_checkpoint or args.load != args.save:
            raise UsageError(f"--load {args.load} holds no checkpoint and no Hugging Face model")
        log.info(f"weights: random ({args.load} holds no checkpoint yet)")
        trained.optimizer.reload_model_params()
        return Position()
    reader = MegatronReader(args.load, args.ckpt_step, prefer=model_rank())
    _check_same_model(reader.arch, trained.arch, args.load)
    load_weights(reader, trained.layout, model_rank(), trained.chunks)
    position = _resume(trained, args, reader)
    reader.close()
    return position


def _check_same_model(there: Qwen3Arch, here: Qwen3Arch, load: str) -> None:
    if not there.same_weights(here):
        raise UsageError(f"--load {load} holds {there}; the model is {here}")


def _resume(trained: Trained, args: CheckpointArgs, reader: MegatronReader) -> Position:
    """Everything but the weights."""
    file = reader.open(next(reader.layout.ranks()))
    content = file.content
    weights_only = "opt_param_scheduler" not in content
    if args.finetune or weights_only:
        trained.optimizer.reload_model_params()
        why = "--finetune" if args.finetune else "the checkpoint has weights only"
        log.info(f"weights: {reader.folder} ({reader.layout}); training starts at step 0: {why}")
        return Position()
    saved = content["args"]
    if args.load_optim:
        _load_optimizer(trained, reader)
    else:
        trained.optimizer.reload_model_params()
    trained.scheduler.load_state_dict(content["opt_param_scheduler"])
    if args.load_rng:
        _load_rng(trained, reader)
    position = Position(content["iteration"], saved.consumed_train_samples)
    log.info(f"resumed: {reader.folder} ({reader.layout}) at step {position.iteration}, sample {position.samples}")
    return position


def _load_optimizer(trained: Trained, reader: MegatronReader) -> None:
    rank = model_rank()

    def tensors_of(key: str) -> ShardedTensors:
        models = lambda content, chunk, chunks: content["state"][key].get(chunk, {})  # noqa: E731
        return ShardedTensors(reader.folder, OPTIMIZER, reader.arch, reader.layout, models, prefer=rank)

    first = reader.folder / reader.layout.folder(next(reader.layout.ranks())) / OPTIMIZER
    if not first.is_file():
        raise UsageError(f"{reader.folder} was saved without optimizer state; give --no-load-optim or --finetune")
    sources = {key: tensors_of(key) for key in optimizer_state.KEYS}
    wanted = {(shard.chunk, shard.name): shard for shard in shards(trained.arch, trained.layout, rank)}

    def read(chunk: int, name: str, key: str) -> torch.Tensor:
        return to_torch(read_shard(sources[key], wanted[chunk, name], F32), F32)

    step = PtFile(first).content["step"]
    optimizer_state.restore(trained.optimizer, optimizer_state.parameter_names(trained.chunks), step, read)
    for source in sources.values():
        source.close()


def _load_rng(trained: Trained, reader: MegatronReader) -> None:
    rank = model_rank()
    if reader.layout != trained.layout:
        log.info(f"random state: new, since the checkpoint's layout is {reader.layout}")
        return
    file = reader.open(rank)
    if "rng_state" not in file.content:
        raise UsageError(f"{reader.folder} was saved without random state; give --no-load-rng or --finetune")

    def tensor(ref: TensorRef) -> torch.Tensor:
        return torch.from_numpy(file.read(ref, ref.shape, full(ref.shape)))

    state = file.content["rng_state"]
    torch.set_rng_state(tensor(state["torch_rng_state"]))
    torch.cuda.set_rng_state(tensor(state["cuda_rng_state"]))
    tracker = {name: tensor(ref) for name, ref in state["rng_tracker_states"].items()}
    tensor_parallel.get_cuda_rng_tracker().set_states(tracker)


def check_writable(folder: str) -> None:
    """Raises: UsageError: --save cannot be written; found out before training, not at its first checkpoint."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder) / ".probe"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"--save {folder} cannot be written: {error.strerror}") from None
