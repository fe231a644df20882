"""Which folder of a Megatron checkpoint to read: tracker file, iterations, format.

<root>/latest_checkpointed_iteration.txt    an iteration number, or "release"
<root>/iter_0000001/                        mp_rank_*/model_optim_rng.pt (torch) or .metadata and *.distcp (torch_dist)
<root>/release/                             the same
"""

from __future__ import annotations

from pathlib import Path

from qwen3_npu.errors import UsageError

TRACKER = "latest_checkpointed_iteration.txt"
TORCH, TORCH_DIST = "torch", "torch_dist"
COMMON, METADATA, CONFIG = "common.pt", ".metadata", "metadata.json"  # files of the torch_dist format


def iteration_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def read_tracker(root: Path) -> str | None:
    """What the tracker file says: an iteration, "release", or None if there is no such file."""
    try:
        return (root / TRACKER).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def format_of(folder: Path) -> str | None:
    """The format of an iteration's folder, or None if it is neither."""
    if any(folder.glob("mp_rank_*")):
        return TORCH
    if any((folder / name).is_file() for name in (METADATA, CONFIG)):
        return TORCH_DIST
    return None


def checkpoint_folder(root: str | Path, iteration: int | None = None) -> Path:
    """The `iter_*` (or `release`) folder to load.

    Args:
        root: the checkpoint's folder, or an `iter_*` folder itself.
        iteration: which one; the tracker's if None.

    Raises:
        UsageError: nothing to load there.
    """
    root = Path(root)
    if root.name.startswith(("iter_", "release")) and format_of(root):
        return root
    if iteration is not None:
        name = iteration_name(iteration)
    else:
        tracked = read_tracker(root)
        if tracked is None:
            raise UsageError(f"{root} is not a Megatron checkpoint: it has no {TRACKER}")
        if tracked != "release" and not tracked.isdigit():
            raise UsageError(f"{root / TRACKER} says {tracked!r}; an iteration number or 'release' is expected")
        name = "release" if tracked == "release" else iteration_name(int(tracked))
    if not (root / name).is_dir():
        there = ", ".join(sorted(p.name for p in root.glob("iter_*") if p.name[5:].isdigit())) or "none"
        raise UsageError(f"{root / name} does not exist; iterations there: {there}")
    if format_of(root / name) is None:
        raise UsageError(f"{root / name} holds neither mp_rank_* folders nor .metadata; the checkpoint is not whole")
    return root / name
