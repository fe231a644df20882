"""What a conversion writes: a folder of files that becomes visible all at once, last."""

from __future__ import annotations

import abc
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_npu.checkpoint.convert.jobs import FileJob, Record, remove_records
from qwen3_npu.errors import UsageError


class Output(abc.ABC):
    """One output in one format.

    Attributes:
        root: what the user named; configuration, tokenizer and conversion.json go there.
        folder: where the files end up.
        stage: where they are made.
        jobs: one per file.
    """

    root: Path
    folder: Path
    stage: Path
    jobs: Sequence[FileJob]

    @abc.abstractmethod
    def facts(self) -> dict[str, Any]:
        """Format, dtype and layout, for the manifest; another output has other facts."""

    @abc.abstractmethod
    def existing(self) -> str | None:
        """What is in the way, in words."""

    @abc.abstractmethod
    def publish(self, records: Mapping[str, Record]) -> None:
        """Move finished files from `stage` to `folder`, in place of what is there."""

    @abc.abstractmethod
    def commit(self) -> None:
        """Make the output visible; the last step."""

    @abc.abstractmethod
    def unexpected_files(self) -> list[str]:
        """Files in `folder` that a reader would take for a part of it but that no job makes."""

    def prepare(self, overwrite: bool) -> None:
        """Raises: UsageError: something is in the way (without `overwrite`)."""
        if overwrite:
            shutil.rmtree(self.stage, ignore_errors=True)
        elif (what := self.existing()) is not None:
            raise UsageError(f"{what}; give --overwrite to replace it, or another --save-dir")


def move_files(stage: Path, folder: Path, old: Sequence[Path]) -> None:
    """Replace `old` files of a folder by those of the stage."""
    remove_records(stage)
    for path in old:
        path.unlink()
    for path in sorted(stage.iterdir()):  # an index sorts after the weights it names
        os.replace(path, folder / path.name)
    stage.rmdir()
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush renames to disk."""
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def write_text(path: Path, text: str) -> None:
    """A small file, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def same_folder(one: str, other: str) -> bool:
    """Whether two names mean one folder."""
    return Path(one).resolve() == Path(other).resolve()


def check_writable(folder: Path, flag: str) -> None:
    """Make a folder and try it, before anything costly. Raises: UsageError: `flag` names one that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"{flag} {folder} cannot be written: {error.strerror}") from None
