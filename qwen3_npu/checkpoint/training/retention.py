"""Retention: which checkpoints of a training's folder are deleted."""

from __future__ import annotations

from pathlib import Path

from qwen3_npu import log
from qwen3_npu.checkpoint.folders import clear, is_trained, iteration_name, iterations, remove


def tidy(root: Path, iteration: int, limit: int | None) -> None:
    """Delete older checkpoints after a save. A checkpoint that cannot be deleted is a warning.

    Args:
        limit: --save-total-limit.
    """
    try:
        clear(root)
        if limit is not None:
            keep_newest(root, iteration, limit)
    except OSError as error:  # a file in use on NFS, another owner's
        log.warning(f"{error.filename} cannot be deleted ({error.strerror}); it is tried again after the next save")


def keep_newest(root: Path, iteration: int, limit: int) -> list[int]:
    """Delete all but the newest `limit` checkpoints up to `iteration`, which was just saved. Returns the deleted ones.

    Only checkpoints of a training are deleted: never converted weights, nor checkpoints of later steps.
    """
    saved = [i for i in iterations(root) if i <= iteration and is_trained(root / iteration_name(i))]
    for old in saved[limit:]:
        remove(root / iteration_name(old))
    return saved[limit:]
