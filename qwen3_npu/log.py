"""Console output of a distributed job: rank 0 prints everything, other ranks only warnings."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from qwen3_npu import console
from qwen3_npu.errors import printable

_LAYOUT = "\n\t"  # control characters that this package's own messages use
LOGGER = logging.getLogger("qwen3_npu")
_silent: list[int] = []  # holds this rank, if it is not rank 0
_told: set[str] = set()  # what `warning_once` has printed


class _Format(logging.Formatter):
    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.prefix = f"[rank {rank}] " if world_size > 1 and rank > 0 else ""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"{self.prefix}{level}{printable(record.getMessage(), keep=_LAYOUT)}"


class _Handler(logging.StreamHandler):
    """Writes to stdout; one that is closed does not end the program."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            console.give_up(error)
        else:
            super().handleError(record)


def setup(rank: int = 0, world_size: int = 1) -> None:
    """Send this package's messages to stdout; ranks other than 0 print warnings only. Safe to call again."""
    console.escape_output()
    handler = _Handler(sys.stdout)
    handler.setFormatter(_Format(rank, world_size))
    LOGGER.handlers[:] = [handler]
    LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    _silent.clear()
    _told.clear()
    if rank:
        _silent.append(rank)


def info(message: str) -> None:
    """A line from rank 0."""
    LOGGER.info(message)


def warning(message: str) -> None:
    """A line from any rank."""
    LOGGER.warning(message)


def warning_once(message: str) -> None:
    """A warning that every rank gives, perhaps several times; rank 0 prints it once."""
    if not _silent and message not in _told:
        _told.add(message)
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
