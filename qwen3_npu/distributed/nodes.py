"""Check that all nodes see the same folder under a path, and the same data."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import torch.distributed as dist

from qwen3_npu.distributed import environment
from qwen3_npu.distributed.agreement import first_problem
from qwen3_npu.errors import UsageError

_PATIENCE = 10.0  # seconds; a network file system shows a new file late


def check_shared(folder: Path, flag: str) -> None:
    """Check that every process sees a file that rank 0 writes to an existing folder. Every rank must call this.

    Raises:
        UsageError: on every rank, if some do not; it names the node of the first one.
    """
    if dist.get_world_size() == 1:
        return
    name = [f".shared-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(name, 0)
    probe = folder / name[0]
    if dist.get_rank() == 0:
        probe.touch()
    dist.barrier()
    blind = first_problem(None if _appears(probe) else os.uname().nodename)
    if dist.get_rank() == 0:
        probe.unlink()
    if blind is not None:
        raise UsageError(
            f"{flag} {folder}: not seen from all nodes: what rank 0 writes does not appear on {blind[1]} (rank "
            f"{blind[0]}); give a folder that all nodes share, or --save-per-node"
        )


def check_own(folder: Path, flag: str) -> None:
    """Check that no node sees a file of another node in its folder. Every rank must call this.

    Raises:
        UsageError: on every rank, if one does.
    """
    node, name = environment.node(), [f".own-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(name, 0)
    (folder / f"{name[0]}-{node}").touch()
    dist.barrier()
    seen = first_problem(flag if len(list(folder.glob(f"{name[0]}-*"))) > 1 else None)
    (folder / f"{name[0]}-{node}").unlink(missing_ok=True)
    if seen is not None:
        raise UsageError(f"{flag} {folder} is shared by the nodes; drop --save-per-node")


def check_same(digest: str | None, what: str) -> None:
    """Check that all processes have the same digest as rank 0. Every rank must call this.

    Args:
        digest: of the data that this process found; None if it did not look. Rank 0 must give one.

    Raises:
        UsageError: on every rank, if digests differ; it names the node of the first one.
    """
    expected = [(digest, os.uname().nodename)]
    dist.broadcast_object_list(expected, 0)
    other = first_problem(None if digest in (None, expected[0][0]) else os.uname().nodename)
    if other is not None:
        raise UsageError(f"{what} on {other[1]} is not what it is on {expected[0][1]}; copy it there again")


def _appears(path: Path) -> bool:
    end = time.monotonic() + _PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
