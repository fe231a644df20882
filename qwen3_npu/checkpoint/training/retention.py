"""Which checkpoints of a training's folder there are, which one to take up, and which ones to delete."""

from __future__ import annotations

import shutil
from pathlib import Path

from qwen3_npu.checkpoint.formats.folders import iteration_name, read_tracker
from qwen3_npu.checkpoint.integrity import is_sealed
from qwen3_npu.files import rename

_REMOVED = ".removed"  # a checkpoint that is being deleted; it must not look like one meanwhile
_REPLACED = ".replaced"  # a whole one whose place another of the same step is about to take


def iterations(root: Path) -> list[int]:
    """Iterations whose folders are there, the newest first."""
    return sorted((int(p.name[5:]) for p in root.glob("iter_*") if p.name[5:].isdigit() and p.is_dir()), reverse=True)


def candidates(root: Path) -> list[int]:
    """Iterations to take up, in order: the tracker's, then those before it.

    Without a tracker they are those that a training finished: it was killed after its first checkpoint's last file,
    before the tracker's. None if the tracker says "release" or nonsense; a reader says which.
    """
    tracked = read_tracker(root)
    if tracked is None:
        return [i for i in iterations(root) if is_sealed(root / iteration_name(i))]
    return [int(tracked), *(i for i in iterations(root) if i < int(tracked))] if tracked.isdigit() else []


def move_to_backup(folder: Path) -> None:
    """Make room for a checkpoint of the same step. Killed before that one is there, `restore_backup` undoes it."""
    backup = folder.with_name(folder.name + _REPLACED)
    if folder.exists():
        remove(backup)
        rename(folder, backup)


def restore_backup(root: Path) -> None:
    """Put back what was moved backup for a checkpoint that never came."""
    for backup in root.glob(f"iter_*{_REPLACED}"):
        if not (folder := backup.with_name(backup.name.removesuffix(_REPLACED))).exists():
            rename(backup, folder)


def remove(folder: Path) -> None:
    """Delete a checkpoint; killed meanwhile, it leaves nothing that looks like one."""
    if folder.exists():
        tmp = folder.with_name(folder.name + _REMOVED)
        shutil.rmtree(tmp, ignore_errors=True)
        rename(folder, tmp)
        shutil.rmtree(tmp)


def clear(root: Path) -> None:
    """Delete what was replaced, and what trainings that were killed meanwhile left of checkpoints they deleted."""
    for backup in root.glob(f"iter_*{_REPLACED}"):
        remove(backup)
    for leftover in root.glob(f"iter_*{_REMOVED}"):
        shutil.rmtree(leftover, ignore_errors=True)


def keep_newest(root: Path, iteration: int, limit: int) -> list[int]:
    """Delete all but `limit` checkpoints up to `iteration`, which was just saved; those deleted.

    Only what a training saved is deleted: never converted weights, nor checkpoints of later steps.
    """
    saved = [i for i in iterations(root) if i <= iteration and is_sealed(root / iteration_name(i))]
    for old in saved[limit:]:
        remove(root / iteration_name(old))
    return saved[limit:]
