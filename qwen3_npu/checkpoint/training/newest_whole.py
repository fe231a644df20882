"""Find the newest checkpoint of a folder that is whole; all ranks look together and come to the same answer."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from qwen3_npu import log
from qwen3_npu.checkpoint.formats.folders import format_of, iteration_name, read_tracker
from qwen3_npu.checkpoint.integrity import MANIFEST, damage, is_sealed, share_bytes
from qwen3_npu.checkpoint.training.retention import candidates, restore_backup
from qwen3_npu.errors import UsageError
from qwen3_npu.progress import Progress

AS_NAMED = "as named"  # what the tracker or --load itself names is no iteration; readers find it


def newest_whole(load: str, step: int | None) -> int | str | None:
    """The iteration to load, or `AS_NAMED`, or None if there is no checkpoint. Every rank must call this.

    A damaged checkpoint is named, and the one before it is tried.

    Args:
        step: the only iteration that will do, if the user names one.

    Raises:
        UsageError: there are checkpoints, but none is whole.
    """
    root = Path(load)
    said: list[list[int] | str | None] = [_options(root, step) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(said, 0)  # all ranks go by what rank 0 sees
    options = said[0]
    if options is None or isinstance(options, str):
        return options
    for iteration in options:
        wrong = _problems(root / iteration_name(iteration))
        if not wrong:
            if iteration != options[0]:
                log.info(f"warning: {root / iteration_name(iteration)} is the newest whole checkpoint and is used")
            return iteration
        for line in wrong:
            log.info(f"warning: damaged checkpoint: {line}")
    tried = ", ".join(iteration_name(iteration) for iteration in options)
    raise UsageError(f"--load {load} holds no whole checkpoint (damaged: {tried}; the files are named above)")


def _options(root: Path, step: int | None) -> list[int] | str | None:
    if root.name.startswith(("iter_", "release")) and format_of(root):
        return AS_NAMED
    restore_backup(root)
    if step is not None:
        return [step] if (root / iteration_name(step)).is_dir() else AS_NAMED
    found = candidates(root)
    return found or (None if read_tracker(root) is None else AS_NAMED)


def _problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint; the ranks share its files out. Every rank must call this."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    said: list[str | None] = [_look(folder) if rank == 0 else None]
    dist.broadcast_object_list(said, 0)
    if said[0] is not None:
        return [said[0]] if said[0] else []
    if rank == 0:
        with Progress(f"checking {folder.name}", share_bytes(folder, rank, ranks), {"bytes": "B"}) as progress:
            mine = damage(folder, rank, ranks, lambda done: progress.add(bytes=done))
    else:
        mine = damage(folder, rank, ranks)
    everyone: list[list[str]] = [[] for _ in range(ranks)]
    dist.all_gather_object(everyone, mine)
    return list(dict.fromkeys(line for lines in everyone for line in lines))


def _look(folder: Path) -> str | None:
    """What is wrong at first sight; "" if nothing is but there is nothing to check by; None: to be checked."""
    if is_sealed(folder):
        return None
    if not folder.is_dir():
        return f"{folder} is missing"
    if format_of(folder) is None:
        return f"{folder} holds no files of a checkpoint"
    log.info(f"{folder} has no {MANIFEST}; its files are not checked before they are read")
    return ""
