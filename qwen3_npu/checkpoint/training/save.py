"""Save a training: weights, optimizer, schedule, random state and data position; atomic. `load.py` resumes it.

    <root>/iter_0000010/...                        in one of two formats: `formats/torch_write.py`, `dist_write.py`
                       /integrity.json             size and digest of every file
    <root>/config.json, tokenizer files            of the model
    <root>/latest_checkpointed_iteration.txt       written last

`snapshot` collects the tensors of this rank, `write_rank` writes the rank's files into `iter_*.partial`, and on rank 0
`commit` completes them and makes them visible, once every rank has written. A folder named `iter_*` is complete.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config

from qwen3_npu import log
from qwen3_npu.args.training import CheckpointArgs
from qwen3_npu.checkpoint import folders
from qwen3_npu.checkpoint.binary.dtypes import DType
from qwen3_npu.checkpoint.folders import TRACKER, iteration_name, move_to_backup
from qwen3_npu.checkpoint.formats.huggingface import CARRIED_FILES, carry_files, write_config
from qwen3_npu.checkpoint.formats.open import WRITERS
from qwen3_npu.checkpoint.formats.torch_write import CHECKPOINT_VERSION, STATES, RankState, Target, lora_args, to_args
from qwen3_npu.checkpoint.mapping.source import Contents, is_lora
from qwen3_npu.checkpoint.training import optimizer_state, retention
from qwen3_npu.checkpoint.training.live import (
    LiveTensors,
    announce,
    by_torch,
    check_finite,
    copied_to_host,
    dtype_of,
    parameters_of,
    to_numpy,
)
from qwen3_npu.checkpoint.training.optimizer_state import ShardedState
from qwen3_npu.checkpoint.training.replicate import NodeDisks
from qwen3_npu.checkpoint.training.writing import Writing
from qwen3_npu.distributed.agreement import first_problem, smallest
from qwen3_npu.distributed.launch import model_rank
from qwen3_npu.distributed.layout import Layout, Rank
from qwen3_npu.errors import SaveFailed, UsageError
from qwen3_npu.files import rename, sync_folder, sync_tree, write_text
from qwen3_npu.model.arch import read_hf_config

Tensors = Mapping[tuple[int, str], torch.Tensor]  # (virtual chunk, name) -> tensor


@dataclasses.dataclass(frozen=True)
class Position:
    """The position of a training.

    Attributes:
        iteration: optimizer steps done.
        samples: training samples consumed.
    """

    iteration: int = 0
    samples: int = 0


@dataclasses.dataclass(frozen=True)
class Trained:
    """The training whose state a checkpoint holds.

    Attributes:
        contents: the model's tensors, with those of its LoRA adapter.
        chunks: the model chunks of this rank, not wrapped.
        frozen: Hugging Face names of the weights that are not trained, beside those that LoRA freezes.
    """

    contents: Contents
    layout: Layout
    chunks: Sequence[torch.nn.Module]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    frozen: frozenset[str] = frozenset()

    @property
    def optimized(self) -> Contents:
        """The trained tensors."""
        lora = self.contents.lora and dataclasses.replace(self.contents.lora, is_residual=False)
        return dataclasses.replace(self.contents, base=lora is None, lora=lora, without=self.frozen)

    @property
    def dtype(self) -> DType:
        """Of the model's weights, also on a rank that has none: its layers are no-op layers, or held in 4 bits."""
        return by_torch(get_model_config(self.chunks[0]).params_dtype)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The state of one model rank, ready to be written.

    Attributes:
        target: equal on every rank: contents, layout, args, schedule.
        weights: of this rank.
        optimizer: one of `STATES` -> this rank's tensors of the trained parameters; empty if not saved.
        sharded: instead of `optimizer`: this rank's share of a distributed optimizer, to be joined from files.
        step: optimizer steps made.
        random: states of the random generators; None: not saved.
    """

    target: Target
    rank: Rank
    weights: Tensors
    optimizer: Mapping[str, Tensors]
    sharded: ShardedState | None
    step: int
    random: dict[str, object] | None


def begin_save(
    trained: Trained,
    position: Position,
    args: CheckpointArgs,
    extra: dict[str, object],
    *,
    config: Path | None,
    adapter_only: bool = False,
    disks: NodeDisks | None = None,
) -> Writing:
    """Begin a checkpoint. With --async-save a thread writes it, else `wait` of the result does. Every rank must call
    both.

    Args:
        extra: further entries of the saved args.
        config: folder whose config.json and tokenizer files are carried along.
        adapter_only: save the LoRA adapter without the frozen weights (--lora-ckpt-filter).
        disks: the nodes' disks, where nodes do not share --save.

    Raises:
        SaveFailed: on every rank, if the folder cannot be made.
        Stopped: on every rank, if a weight or the optimizer's state is NaN or infinite: such a checkpoint must not
            replace good ones.
    """
    optimizer_state.gather_weights(trained.optimizer)
    # Codes of quantized weights are no numbers.
    named = parameters_of(trained.chunks).items()
    weights = ((name, parameter) for (_, name), parameter in named if parameter.is_floating_point())
    state = optimizer_state.named(trained.optimizer) if args.save_optim else ()
    check_finite(itertools.chain(weights, state), f"iteration {position.iteration} is not saved")
    root, rank = Path(str(args.save)), dist.get_rank()
    folder = root / iteration_name(position.iteration)
    stage = folder.with_name(folder.name + ".partial")
    problem, keeps = None, disks.is_first if disks is not None else rank == 0
    if keeps:
        shutil.rmtree(stage, ignore_errors=True)
        try:
            stage.mkdir(parents=True)
        except OSError as error:
            problem = f"{folder} was not saved: {error}"
    # Nobody writes before rank 0 has made the stage.
    writers = _writers(trained.layout, model_rank(), problem)
    held = snapshot(trained, position, args, extra, adapter_only=adapter_only, writes=rank in writers)
    put = held.sharded.put if held.sharded is not None else None
    return Writing(
        str(folder),
        (
            lambda writing: put(stage) if put is not None else None,
            lambda writing: write_rank(held, stage, args.ckpt_format, writing, writes=rank in writers),
            lambda writing: exchange(disks, writing) if disks is not None else None,
        ),
        (lambda: commit(held.target, stage, folder, writers, args=args, config=config)) if keeps else None,
        stage,
        writers=writers,
        background=args.async_save,
        exchange=2 if disks is not None else None,
    )


def exchange(disks: NodeDisks, writing: Writing) -> None:
    """Exchange files, so that every node gets all of them, once its own ranks have written theirs."""
    is_whole = False
    try:
        own = [folders.part(rank) for rank in disks.beside(writing.writers)]
        is_whole = not disks.is_first or (not writing.error and writing.wait_for(own))
    finally:
        disks.replicate(writing.stage, is_whole=is_whole)


def _writers(layout: Layout, shard: Rank, problem: str | None) -> list[int]:
    """The ranks that write: the first rank with each shard. Raises: SaveFailed: a rank has a problem."""
    found = first_problem(problem)
    if found is not None:
        raise SaveFailed(found[1])
    folders, ranks = list(dict.fromkeys(map(layout.folder, layout.ranks()))), dist.get_world_size()
    own = layout.folder(shard)
    first = smallest([dist.get_rank() if folder == own else ranks for folder in folders])
    return sorted(rank for rank in first if rank < ranks)


def snapshot(
    trained: Trained,
    position: Position,
    args: CheckpointArgs,
    extra: dict[str, object],
    *,
    adapter_only: bool,
    writes: bool,
) -> Snapshot:
    """Everything that this rank saves; with --async-save it is copied to the host and gathered later.

    Args:
        writes: this rank writes files of its own.
    """
    contents = dataclasses.replace(trained.contents, base=False) if adapter_only else trained.contents
    saved_args = to_args(contents.arch, trained.layout, trained.dtype)
    if contents.lora:
        saved_args |= lora_args(contents.lora)
    saved_args |= {"iteration": position.iteration, "consumed_train_samples": position.samples, **extra}
    step = optimizer_state.step_count(trained.optimizer)
    common = {
        "args": argparse.Namespace(**saved_args),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": position.iteration,
        "opt_param_scheduler": trained.scheduler.state_dict(),
    }
    if args.ckpt_format != "torch":
        common["optimizer_step"] = step
    weights: dict[tuple[int, str], torch.Tensor] = {
        place: parameter
        for place, parameter in parameters_of(trained.chunks).items()
        if contents.base or is_lora(place[1])
    }
    gathered: optimizer_state.Gathered = {}
    sharded = None
    names = optimizer_state.parameter_names(trained.chunks)
    # Files of other nodes cannot be joined here.
    if args.save_optim and optimizer_state.is_distributed(trained.optimizer) and not args.save_per_node:
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
    return Snapshot(
        Target(contents, trained.layout, trained.dtype, trained.dtype, trained=common),
        model_rank(),
        copied_to_host(weights) if args.async_save and writes else weights,
        by_state(gathered) if args.save_optim and sharded is None else {},
        sharded=sharded,
        step=step,
        random=copied_to_host(random) if args.async_save else random,
    )


def by_state(gathered: optimizer_state.Gathered) -> dict[str, Tensors]:
    """One of `STATES` -> (chunk, name) -> tensor."""
    return {key: {place: tensors[key] for place, tensors in gathered.items()} for key in STATES}


def write_rank(held: Snapshot, stage: Path, form: str, writing: Writing, *, writes: bool) -> None:
    """Write this rank's files, and tell rank 0 (`folders.write_part`).

    Args:
        form: `TORCH` or `TORCH_DIST`.
        writes: it has files of its own.
    """
    optimizer = held.optimizer
    if held.sharded is not None:
        if not writing.wait_for(held.sharded.awaited()):
            return
        optimizer = by_state(held.sharded.collect(stage))
    if not writes:
        return
    target, rank = held.target, held.rank
    tensors = {"": held.weights, **optimizer}
    sources = {key: LiveTensors(here, target.contents, target.layout, rank) for key, here in tensors.items()}
    dtypes = {key: {place: dtype_of(tensor) for place, tensor in here.items()} for key, here in tensors.items()}
    random, data = announce(held.random) if held.random is not None else (None, [])
    state = RankState(dtypes, held.step, random, tuple(map(to_numpy, data)))
    seals, notes = {}, []
    for job in WRITERS[form].jobs(target, rank, state):
        (stage / job.name).parent.mkdir(exist_ok=True)
        arrays = (sources[item.state].shard(item.shard, item.dtype) for item in job.items())
        seals[job.name], said = job.write(stage / job.name, arrays)
        notes.append(said)
    folders.write_part(stage, dist.get_rank(), seals, notes)


def commit(
    target: Target,
    stage: Path,
    folder: Path,
    writers: Sequence[int],
    *,
    args: CheckpointArgs,
    config: Path | None,
) -> None:
    """Write the common files, seal the checkpoint and make it visible; then delete old ones."""
    root = folder.parent
    seals, notes = folders.read_parts(stage, writers)
    seals |= WRITERS[args.ckpt_format].finish(target, stage, [note for part in notes for note in part])
    folders.write_integrity(stage, folders.TRAINING, seals)
    folders.drop_parts(stage, writers)
    sync_tree(stage)
    write_config(target.contents.arch, _carried(config, root), root, target.dtype)
    move_to_backup(folder)
    rename(stage, folder)
    sync_folder(root)
    iteration = int(target.common["iteration"])
    write_text(root / TRACKER, str(iteration))
    retention.tidy(root, iteration, args.save_total_limit)


def _carried(config: Path | None, root: Path) -> dict[str, object] | None:
    """Copy tokenizer files. Returns config.json as it was before the flags changed the model.

    If the source has vanished or cannot be read any more, the checkpoint is still saved.
    """
    if config is None:
        return None
    try:
        carry_files(config, root, [name for name in CARRIED_FILES if name != "config.json"])
        return read_hf_config(config) if (config / "config.json").is_file() else None
    except (OSError, UsageError) as error:
        log.warning(f"{config}: its tokenizer files do not go with the checkpoint in {root}: {error}")
        return None
