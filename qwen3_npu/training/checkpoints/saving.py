"""A training's checkpoints: resume, save, finish."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from qwen3_npu import log, schema
from qwen3_npu.args.lora import LoraArgs
from qwen3_npu.args.training import CheckpointArgs
from qwen3_npu.checkpoint.folders import TRACKER, iteration_name, iterations, restore_backup
from qwen3_npu.checkpoint.training import load, save
from qwen3_npu.checkpoint.training.replicate import NodeDisks
from qwen3_npu.checkpoint.training.save import Position, Trained
from qwen3_npu.checkpoint.training.writing import Writing
from qwen3_npu.distributed import environment
from qwen3_npu.errors import SaveFailed, Stopped
from qwen3_npu.files import check_writable, same_folder, write_text
from qwen3_npu.lease import Lease, folder_lease
from qwen3_npu.progress import human

_BEFORE = "before_this_run.json"  # names the job, and its tracker at the start: later trackers are this job's own


def check_folders(args: CheckpointArgs, lora: LoraArgs) -> None:
    """Check the folders before anything slow.

    Raises:
        UsageError: --save cannot be written.
    """
    if args.save is None:
        if args.save_interval or args.async_save or args.save_total_limit:
            log.info("no checkpoint will be saved: there is no --save")
        return
    root = Path(args.save)
    check_writable(root, "--save")
    if environment.restarts() == 0 and not _resumes(args, lora) and (there := iterations(root)):
        log.info(
            f"warning: --save {root} already holds checkpoints up to {iteration_name(there[0])}, and --load is "
            f"{args.load or 'not given'}: they are replaced as this training reaches their steps; to continue "
            f"them give --{'lora-' * lora.lora_ckpt_filter}load {root}"
        )


@contextlib.contextmanager
def leased(args: CheckpointArgs) -> Iterator[Lease | None]:
    """Hold the lease of --save on rank 0 during the context. Raises: UsageError: another process holds it."""
    if args.save is None or environment.ranks()[2 if args.save_per_node else 0] > 0:
        yield None
    else:
        with folder_lease(Path(args.save), "--save") as lease:
            yield lease


def continued(args: CheckpointArgs, lora: LoraArgs) -> tuple[CheckpointArgs, LoraArgs]:
    """The flags for loading. Every rank must call this.

    A job that torchrun has restarted resumes from the newest checkpoint that it has saved itself.
    """
    if args.save is None or _resumes(args, lora):
        return args, lora
    said = [_has_saved(Path(args.save)) if dist.get_rank() == 0 else False]
    dist.broadcast_object_list(said, 0)
    if not said[0]:
        return args, lora
    instead = f"--lora-load {lora.lora_load}" if lora.lora_ckpt_filter else f"--load {args.load}"
    log.info(f"restarted by torchrun: resuming from {args.save} instead of {instead}")
    args = dataclasses.replace(args, finetune=False, load_optim=args.save_optim, load_rng=args.save_rng)
    if lora.lora_ckpt_filter:  # the base is not saved
        return args, dataclasses.replace(lora, lora_load=args.save)
    return dataclasses.replace(args, load=args.save, ckpt_step=None), dataclasses.replace(lora, lora_load=None)


def _resumes(args: CheckpointArgs, lora: LoraArgs) -> bool:
    """Whether this training is loaded from --save."""
    loads = [load for load in (args.load, lora.lora_load) if load is not None]
    return any(same_folder(load, str(args.save)) for load in loads)


def _has_saved(root: Path) -> bool:
    """Whether this job has saved a checkpoint in an earlier start; rank 0's part."""
    job, state = environment.job_names(), _tracker_state(root)
    names, before = _before(root)
    # Of another job: this is the first start, or the starts before it were killed before this point and saved nothing.
    if environment.restarts() == 0 or names.isdisjoint(job):
        write_text(root / _BEFORE, json.dumps({"job": job, "tracker": state}))
        return False
    return state not in (None, before)


def _tracker_state(root: Path) -> list | None:
    """Text and modification time of the tracker."""
    try:
        return [(root / TRACKER).read_text(encoding="utf-8"), (root / TRACKER).stat().st_mtime_ns]
    except FileNotFoundError:
        return None


def _before(root: Path) -> tuple[frozenset[str], object]:
    """Names of the job that began here, and its tracker at that time. Raises: UsageError: the file is damaged."""
    if not (root / _BEFORE).exists():
        return frozenset(), None
    said = schema.read_record(root / _BEFORE)
    job = said.sequence("job")
    return frozenset(schema.text(name, f"{said.where}: job") for name in job), said.fields.get("tracker")


class Saver:
    """Loads and saves the training's state. Every rank must call every method.

    Args:
        args: result of `check_folders`.
        extra: further entries of the saved args; a resumed checkpoint is compared with them.
        config: folder whose config.json and tokenizer files are carried along.
    """

    def __init__(
        self, trained: Trained, args: CheckpointArgs, lora: LoraArgs, extra: dict[str, object], *, config: Path | None
    ) -> None:
        self.trained, self.args, self.lora, self.extra, self.config = trained, args, lora, extra, config
        self.pending: Writing | None = None
        self.failed = 0  # failed checkpoints in a row
        self.own: set[int] = set()  # steps of this training's checkpoints in --save, some of them deleted since
        self.disks = NodeDisks() if args.save_per_node else None
        self.lease: Lease | None = None  # of --save, on rank 0; a training under test has none

    def load(self) -> Position:
        """Weights and, when resuming, everything else. Raises: UsageError: see `load.load`."""
        if self.disks is not None and self.args.load is not None:
            if self.disks.is_first:
                restore_backup(Path(self.args.load))
            dist.barrier()  # no rank looks before rank 0 is done
        position = load.load(self.trained, self.args, self.lora.lora_load, self.extra)
        if self.args.save is not None and position.iteration and _resumes(self.args, self.lora):
            self.own = {step for step in iterations(Path(self.args.save)) if step <= position.iteration}
        return position

    def load_own(self, step: int) -> Position:
        """Load the complete state that this training saved after this step."""
        root = str(self.args.save)
        args = dataclasses.replace(self.args, finetune=False, load_optim=True, load_rng=self.args.save_rng)
        if self.lora.lora_ckpt_filter:  # the base is not saved
            return load.load(self.trained, args, str(Path(root) / iteration_name(step)), self.extra)
        return load.load(self.trained, dataclasses.replace(args, load=root, ckpt_step=step), None, self.extra)

    def save(self, position: Position) -> None:
        """Save a checkpoint of this step; with --async-save this returns while it is being written.

        A checkpoint that cannot be written is a warning, up to --max-failed-saves in a row.

        Raises:
            Stopped: too many saves failed in a row, or another process holds the lease of --save.
        """
        began = time.perf_counter()
        self.finish()
        self._check_lease()
        try:
            writing = save.begin_save(
                self.trained,
                position,
                self.args,
                self.extra,
                config=self.config,
                adapter_only=self.lora.lora_ckpt_filter,
                disks=self.disks,
            )
            if self.args.async_save:
                self.pending = writing
            else:
                writing.wait()
        except SaveFailed as error:
            self._failed(error)
            return
        if not self.args.async_save:
            self.failed = 0
        self.own.add(position.iteration)
        done = "being saved" if self.args.async_save else "saved"
        log.info(f"{done}: {writing.what}; the training waited for {time.perf_counter() - began:.2f} s")

    def _check_lease(self) -> None:
        said: list[str | None] = [None]
        try:
            if self.lease is not None:
                self.lease.check()
        except (Stopped, OSError) as error:
            said = [str(error)]
        dist.broadcast_object_list(said, 0)
        if said[0] is not None:
            raise Stopped(said[0])

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. Raises: Stopped: too many saves failed in a row."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            pending.wait()
        except SaveFailed as error:
            self._failed(error)
            return
        self.failed = 0
        log.info(f"saved: {pending.what}")

    def _failed(self, error: SaveFailed) -> None:
        """On every rank: warn, or end. The incomplete files are removed, since they may be what fills the disk."""
        self.failed += 1
        root = Path(str(self.args.save))
        if self.disks.is_first if self.disks is not None else dist.get_rank() == 0:
            for stage in root.glob("iter_*.partial"):
                shutil.rmtree(stage, ignore_errors=True)
        if self.failed > self.args.max_failed_saves:
            raise Stopped(f"{error}; it is the {self.failed}th in a row, above --max-failed-saves") from error
        log.info(f"warning: {error}; {self._room(root)}the older checkpoints are complete, and training goes on")

    def _room(self, root: Path) -> str:
        """A text about needed and free space, if the last checkpoint shows how much is needed."""
        whole = [root / iteration_name(step) for step in iterations(root)[:1]]
        sizes = [sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in whole]
        free = shutil.disk_usage(root).free
        if not sizes:
            return f"{human(free, 'B')} are free; "
        missing = f", {human(sizes[0] - free, 'B')} are missing" if sizes[0] > free else ""
        return f"a checkpoint needs {human(sizes[0], 'B')} and {human(free, 'B')} are free{missing}; "

    def close(self) -> None:
        """Wait for the last checkpoint. Raises: Stopped: the end of the training is not saved."""
        self.finish()
        if self.failed:
            raise Stopped(f"the last {self.failed} checkpoints could not be saved; see the warnings above")
