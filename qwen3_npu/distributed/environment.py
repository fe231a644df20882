"""What torchrun says in the environment. No torch."""

from __future__ import annotations

import os
import socket

from qwen3_npu.processes import started


def ranks() -> tuple[int, int, int]:
    """Rank, world size and local rank; (0, 1, 0) without torchrun."""
    read = os.environ.get
    return int(read("RANK", "0")), int(read("WORLD_SIZE", "1")), int(read("LOCAL_RANK", "0"))


def has_rendezvous() -> bool:
    """Whether a launcher says where the processes meet."""
    return "MASTER_ADDR" in os.environ


def local_size(world_size: int) -> int:
    """Processes of this node; all of them where the launcher does not say it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def node() -> int:
    """The number of this node, from 0."""
    return int(os.environ.get("GROUP_RANK", "0"))


def restarts() -> int:
    """How often torchrun has started this job again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def job_names() -> list[str]:
    """Names of this job, the same for all its starts; a job has a name in common with this one only if it is this one.

    They are the torchrun process on this machine that started it (process id and time of start), and --rdzv-id.
    """
    agent = os.getppid()
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # "none" is torchrun's default
    return [f"{socket.gethostname()} {agent} {started(agent)}", *([run] if run != "none" else [])]
