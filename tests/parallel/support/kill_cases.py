"""A training that is killed at any change that it makes on disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from qwen3_npu.checkpoint.training.load import newest_whole
from qwen3_npu.checkpoint.training.save import Position
from qwen3_npu.distributed.launch import World
from qwen3_npu.errors import UsageError
from qwen3_npu.parity.measure import trainer
from qwen3_npu.platform.base import Platform

_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
_LEFT = (".partial", ".removed", ".replaced", ".tmp")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Killed(BaseException):
    """Nothing catches it."""


class Killer:
    """Python tells it of every file that is opened, moved or deleted, before that is done."""

    def __init__(self) -> None:
        self.left: int | None = None
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.left is None or not (event in _CHANGES or (event == "open" and args[2] & _WRITES)):
            return
        if self.left == 0:  # and so for all that `finally` and `except` might still do
            raise Killed
        self.left -= 1

    @contextlib.contextmanager
    def after(self, changes: int) -> Iterator[None]:
        """Let so many changes happen and not one more."""
        self.left = changes
        try:
            yield
        finally:
            self.left = None


def saves(
    platform: Platform, world: World, flags: list[str], root: str, there: list[int], step: int
) -> list[int | str | None]:
    """What can be resumed when saving `step`, with checkpoints of steps already there, ends after 0, 1, 2... changes.

    Returns:
        The newest whole checkpoint by the number of changes that were made; the last is that of a whole save.
    """
    folder, killer, found = Path(root) / "save", Killer(), []
    flags = [*flags, "--save", str(folder)]
    with trainer(platform, world, flags) as t, mock.patch("os.fsync"):  # slow, and no part of this
        t.step()
        folder.mkdir()
        for before in there:
            t.saver.save(Position(before, 8 * before))
        start = shutil.copytree(folder, Path(root) / "start")
        for changes in range(1000):
            shutil.rmtree(folder)
            shutil.copytree(start, folder)
            whole = False
            with contextlib.suppress(Killed), killer.after(changes):
                t.saver.save(Position(step, 8 * step))
                whole = True
            try:
                found.append(_newest(folder))
            except UsageError as error:
                found.append(str(error))
            t.saver.save(Position(step, 8 * step))  # what a killed save leaves does not disturb the next
            assert _newest(folder) == step
            assert not [
                path.name for path in folder.rglob("*") if path.suffix in (".partial", ".removed", ".replaced", ".tmp")
            ]
            if whole:
                return found
    raise AssertionError("a save does not end")


def killed(platform: Platform, world: World, flags: list[str], steps: int, changes: int) -> list[float]:
    """The losses of some steps with a checkpoint after each, of which the last ends after so many changes on disk."""
    killer, losses = Killer(), []
    with trainer(platform, world, flags) as t, mock.patch("os.fsync"):
        for number in range(1, steps + 1):
            losses.append(t.step().loss)
            if number < steps:
                t.saver.save(t.position)
        with contextlib.suppress(Killed), killer.after(changes):
            t.saver.save(t.position)
            raise AssertionError("the save was over")
    return losses


def _newest(folder: Path) -> int | None:
    found = newest_whole(str(folder), None)
    return found.iteration if found else None
