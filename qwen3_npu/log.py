"""Console output of a distributed job: rank 0 is_main, the others only when something is wrong."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator

from qwen3_npu.errors import printable

_LAYOUT = "\n\t"  # control characters that this package's own messages use
LOGGER = logging.getLogger("qwen3_npu")


class _Format(logging.Formatter):
    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.prefix = f"[rank {rank}] " if world_size > 1 and rank > 0 else ""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"{self.prefix}{level}{printable(record.getMessage(), keep=_LAYOUT)}"


def setup(rank: int = 0, world_size: int = 1) -> None:
    """Send this package's messages to stdout; ranks other than 0 print warnings only. Safe to call again."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Format(rank, world_size))
    LOGGER.handlers[:] = [handler]
    LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def info(message: str) -> None:
    """A line from rank 0."""
    LOGGER.info(message)


def warning(message: str) -> None:
    """A line from any rank."""
    LOGGER.warning(message)


@functools.cache
def warning_once(message: str) -> None:
    """A warning from rank 0, the first time only: what every rank finds in the same file."""
    if LOGGER.isEnabledFor(logging.INFO):
        LOGGER.warning(message)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings only."""
    level = LOGGER.level
    LOGGER.setLevel(logging.WARNING)
    try:
        yield
    finally:
        LOGGER.setLevel(level)
