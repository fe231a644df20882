"""What torchrun says in the environment. No torch."""

from __future__ import annotations

import os


def ranks() -> tuple[int, int, int]:
    """Rank, world size and local rank; (0, 1, 0) without torchrun."""
    read = os.environ.get
    return int(read("RANK", "0")), int(read("WORLD_SIZE", "1")), int(read("LOCAL_RANK", "0"))


def has_rendezvous() -> bool:
    """Whether a launcher says where the processes meet."""
    return "MASTER_ADDR" in os.environ


def restarts() -> int:
    """How often torchrun has started this job again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
