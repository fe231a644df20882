"""Write the files of a conversion: one job per file, in processes, restartable, with a digest of every tensor.

Files are made in a staging folder. A finished file has a record beside it; a run that is killed leaves finished files
and their records for `--resume`, and nothing that looks like a checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qwen3_npu.checkpoint.source import Source
from qwen3_npu.errors import UsageError
from qwen3_npu.progress import Progress, human

_RECORD = ".record.json"
_SPARE_BYTES = 64 << 20  # left free on the disk, for headers, configuration and tokenizer files

Written = Callable[[str, np.ndarray], None]


class FileJob(Protocol):
    """One output file.

    Attributes:
        name: path relative to the output folder.
        size: bytes of the tensors in it.
    """

    name: str
    size: int

    def write(self, source: Source, path: Path, written: Written) -> None:
        """Make the file at `path`, flushed to disk; tell `written` of each tensor's name and data."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished file: its size in bytes and the SHA-256 of each tensor's bytes."""

    bytes: int
    sha256: dict[str, str]


def run_jobs(
    jobs: Sequence[FileJob], open_source: Callable[[], Source], stage: Path, *, workers: int, resume: bool, what: str
) -> dict[str, Record]:
    """Write every file under `stage`; file name -> record.

    Args:
        open_source: opens the source; each worker process has its own.
        workers: processes; 1 writes in this one.
        resume: keep files that an earlier run finished.
        what: first word of the progress line.

    Raises:
        UsageError: no space, an earlier unfinished run (without `resume`), or the source is damaged.
    """
    records = _earlier(stage) if resume else {}
    if not resume and stage.exists():
        raise UsageError(f"{stage} is an unfinished conversion; continue it with --resume or drop it with --overwrite")
    todo = [job for job in jobs if job.name not in records]
    total = sum(job.size for job in todo)
    _make_writable(stage)
    check_space(stage, total)
    with Progress(what, total, {"bytes": "B"}) as progress:
        if workers <= 1 or len(todo) <= 1:
            source = open_source()
            for job in todo:
                records[job.name] = _write(job, source, stage, lambda n: progress.add(bytes=n))
            source.close()
        else:
            records |= _in_processes(todo, open_source, stage, min(workers, len(todo)), progress)
    return {job.name: records[job.name] for job in jobs}


def remove_records(stage: Path) -> None:
    """Drop the records once every file is finished."""
    for path in stage.rglob("*" + _RECORD):
        path.unlink()


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"cannot write in {folder}: {error.strerror}; choose another --save-dir") from None


def check_space(folder: Path, needed: int) -> None:
    """Raises: UsageError: the disk of `folder` has less than `needed` bytes (and a little) free."""
    free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise UsageError(
            f"{folder} needs {human(needed, 'B')} but its disk has {human(free, 'B')} free; free some or choose "
            f"another --save-dir"
        )


def _earlier(stage: Path) -> dict[str, Record]:
    """Files that an earlier run finished: their record is there and their size agrees with it."""
    records = {}
    for path in sorted(stage.rglob("*" + _RECORD)):
        file = path.with_name(path.name[: -len(_RECORD)])
        record = Record(**json.loads(path.read_text(encoding="utf-8")))
        if file.is_file() and file.stat().st_size == record.bytes:
            records[str(file.relative_to(stage))] = record
    return records


def _write(job: FileJob, source: Source, stage: Path, progress: Callable[[int], None]) -> Record:
    path = stage / job.name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    digests: dict[str, str] = {}

    def written(name: str, data: np.ndarray) -> None:
        digests[name] = hashlib.sha256(memoryview(np.ascontiguousarray(data)).cast("B")).hexdigest()
        progress(data.nbytes)

    try:
        job.write(source, temporary, written)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
    os.replace(temporary, path)
    record = Record(path.stat().st_size, digests)
    record_path = path.with_name(path.name + _RECORD)
    record_path.with_suffix(".tmp").write_text(json.dumps(dataclasses.asdict(record)), encoding="utf-8")
    os.replace(record_path.with_suffix(".tmp"), record_path)
    return record


# A worker's own source and the counter it shares with the parent.
_worker: dict[str, Any] = {}


def _start_worker(open_source: Callable[[], Source], counter: Any) -> None:
    _worker["source"], _worker["counter"] = open_source(), counter


def _work(job: FileJob, stage: Path) -> Record:
    counter = _worker["counter"]

    def progress(count: int) -> None:
        with counter.get_lock():
            counter.value += count

    return _write(job, _worker["source"], stage, progress)


def _in_processes(
    jobs: Sequence[FileJob], open_source: Callable[[], Source], stage: Path, workers: int, progress: Progress
) -> dict[str, Record]:
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    shown = 0
    records = {}
    # The largest first: the last file to finish is then a small one.
    jobs = sorted(jobs, key=lambda job: -job.size)
    with ProcessPoolExecutor(workers, context, _start_worker, (open_source, counter)) as pool:
        futures = {pool.submit(_work, job, stage): job for job in jobs}
        try:
            while not all(future.done() for future in futures):
                time.sleep(0.1)
                progress.add(bytes=counter.value - shown)
                shown = counter.value
                if any(future.done() and future.exception() for future in futures):
                    break
            for future in as_completed(futures):
                records[futures[future].name] = future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    progress.add(bytes=counter.value - shown)
    return records
