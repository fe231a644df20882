"""What readers and writers of files agree on, and the output of a conversion: visible all at once, last."""

from __future__ import annotations

import abc
import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import DType
from qwen3_npu.checkpoint.mapping.table import Shard
from qwen3_npu.errors import UsageError
from qwen3_npu.files import rename, sync_folder

RECORD = ".record.json"  # beside a finished file of a conversion that goes on
PLAN = "plan.json"


class Item(NamedTuple):
    """A tensor to be written: a name that no other of its file has, the pieces it is made of, and its dtype."""

    name: str
    shard: Shard
    dtype: DType

    @property
    def bytes(self) -> int:
        return math.prod(self.shard.shape) * self.dtype.itemsize


class Stored(NamedTuple):
    """A tensor of a finished file."""

    dtype: DType | None
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class FileJob(Protocol):
    """One output file."""

    @property
    def name(self) -> str:
        """Path relative to the output folder."""

    def items(self) -> list[Item]:
        """Every tensor of the file, in order."""

    def write(self, path: Path, tensors: Iterator[np.ndarray]) -> dict[str, Any]:
        """Make the file from the data of `items`, flushed to disk; what the record should remember besides."""

    def stored(self, path: Path) -> dict[str, Stored]:
        """The tensors of a finished file, under the names of `items`. Raises: UsageError: it cannot be read."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished file.

    Attributes:
        bytes: its size.
        sha256: of each tensor's bytes.
        notes: what the job's `write` returned.
    """

    bytes: int
    sha256: dict[str, str]
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


def job_bytes(job: FileJob) -> int:
    """Bytes of the tensors of a job."""
    return sum(item.bytes for item in job.items())


def remove_records(stage: Path) -> None:
    """Drop the records once every file is finished."""
    for path in [*stage.rglob("*" + RECORD), stage / PLAN]:
        path.unlink(missing_ok=True)


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
        rename(path, folder / path.name)
    stage.rmdir()
    sync_folder(folder)
