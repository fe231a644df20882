"""Write the files of a conversion: one job per file, in processes, restartable, with a digest of every tensor.

Files are made in a staging folder. A finished file has a record beside it; a run that is killed leaves finished files
and their records for `--resume`, and nothing that looks like a checkpoint.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from qwen3_npu import log
from qwen3_npu.args.convert import ConvertArgs
from qwen3_npu.checkpoint.folders import Count
from qwen3_npu.checkpoint.mapping.source import FileJob, Item, Source, job_bytes, read_shard
from qwen3_npu.errors import UsageError
from qwen3_npu.files import HASH, Seal, check_writable, file_digest, hashing, rename, write_text
from qwen3_npu.progress import Progress, human

_SPARE_BYTES = 64 << 20  # left free on the disk, for headers, configuration and tokenizer files


RECORD = ".record.json"  # beside a finished file of a conversion that goes on
PLAN = "plan.json"

T = TypeVar("T")
JobResult = TypeVar("JobResult")


class Closable(Protocol):
    """A source that every worker opens by itself."""

    def close(self) -> None: ...


WorkerSource = TypeVar("WorkerSource", bound=Closable)


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A finished file.

    Attributes:
        bytes, digest: of the file.
        tensors: digest of each tensor's bytes.
        notes: what the job's `write` returned.
    """

    bytes: int
    digest: str
    tensors: dict[str, str]
    notes: object = None

    @property
    def seal(self) -> Seal:
        return Seal(self.bytes, self.digest)


def run_jobs(
    jobs: Sequence[FileJob],
    open_source: Callable[[], Source],
    stage: Path,
    *,
    plan: str,
    workers: int,
    resume: bool,
    what: str,
) -> dict[str, FileRecord]:
    """Write every file under `stage`; file name -> record.

    Args:
        open_source: opens the source; each worker process has its own.
        plan: description of the conversion; --resume needs the same one.
        workers: processes; 1 writes in this one.
        resume: keep files that an earlier run finished.
        what: first word of the progress line.

    Raises:
        UsageError: no space, an earlier unfinished run (without `resume`, or with another plan), or the source is
            damaged.
    """
    records = _earlier(stage, plan) if resume else {}
    if not resume and stage.exists():
        raise UsageError(f"{stage} is an unfinished conversion; continue it with --resume or drop it with --overwrite")
    todo = [job for job in jobs if job.name not in records]
    total = sum(map(job_bytes, todo))
    check_writable(stage, "--save-dir")
    check_space(stage, total)
    write_text(stage / PLAN, plan)
    with Progress(what, total, {"bytes": "B"}) as progress:
        records |= in_processes(
            _Write(stage), todo, open_source, workers, progress=lambda count: progress.add(bytes=count)
        )
    return {job.name: records[job.name] for job in jobs}


def check_space(folder: Path, needed: int) -> None:
    """Raises: UsageError: the disk of `folder` has less than `needed` bytes (and a little) free."""
    free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise UsageError(
            f"{folder} needs {human(needed, 'B')} but its disk has {human(free, 'B')} free; free some or choose "
            f"another --save-dir"
        )


def _earlier(stage: Path, plan: str) -> dict[str, FileRecord]:
    """Files that an earlier run finished: they have a record, and their size and digest agree with it."""
    if not (stage / PLAN).is_file():
        return {}
    if (stage / PLAN).read_text(encoding="utf-8") != plan:
        raise UsageError(
            f"{stage} was begun with another source or other settings; repeat those with --resume, or drop it with "
            f"--overwrite"
        )
    records = {}
    for path in sorted(stage.rglob("*" + RECORD)):
        file = path.with_name(path.name[: -len(RECORD)])
        try:
            record = FileRecord(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError):
            log.warning(f"--resume: {path} is no record of this version; its file is made again")
            continue
        if file.is_file() and file.stat().st_size == record.bytes and file_digest(file) == record.digest:
            records[str(file.relative_to(stage))] = record
        else:
            log.warning(f"--resume: {file} is not what was written; it is made again")
    return records


def remove_records(stage: Path) -> None:
    """Drop the records once every file is finished."""
    for path in [*stage.rglob("*" + RECORD), stage / PLAN]:
        path.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class _Write:
    """Makes the file of a job in a folder."""

    stage: Path

    def __call__(self, job: FileJob, source: Source, count: Count) -> FileRecord:
        path = self.stage / job.name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        digests: dict[str, str] = {}

        # Two tensors are in memory at a time. Memory that is new for each one costs a fifth of the conversion: the
        # system fills it with zeros first.
        size = max((item.bytes for item in job.items()), default=0)
        buffers = itertools.cycle([np.empty(size, np.uint8) for _ in range(2)])

        def made(item: Item) -> np.ndarray:
            data = read_shard(source, item.shard, item.dtype, next(buffers))
            digest = hashing(HASH)
            digest.update(data.data.cast("B") if data.size else b"")
            digests[item.name] = digest.hexdigest()
            return data

        def tensors() -> Iterator[np.ndarray]:
            for data in one_ahead(made, job.items()):
                yield data
                count(data.nbytes)

        try:
            seal, notes = job.write(temporary, tensors())
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}; --resume continues from here") from None
        rename(temporary, path)
        record = FileRecord(*seal, digests, notes)
        write_text(path.with_name(path.name + RECORD), json.dumps(dataclasses.asdict(record)))
        return record


def one_ahead(function: Callable[[T], JobResult], items: Sequence[T]) -> Iterator[JobResult]:
    """`map`, but a thread makes the next result while the caller uses the present one."""
    with ThreadPoolExecutor(1) as thread:
        made = None
        for item in items:
            following = thread.submit(function, item)
            if made is not None:
                yield made.result()
            made = following
        if made is not None:
            yield made.result()


# A worker's own source and the counter it shares with the parent.
_worker: dict[str, Any] = {}


def _start_worker(open_source: Callable[[], Closable], counter: object) -> None:
    _worker["source"], _worker["counter"] = open_source(), counter


def _work(function: Callable[[FileJob, WorkerSource, Count], JobResult], job: FileJob) -> JobResult:
    counter = _worker["counter"]

    def count(bytes_done: int) -> None:
        with counter.get_lock():
            counter.value += bytes_done

    return function(job, _worker["source"], count)


def in_processes(
    function: Callable[[FileJob, WorkerSource, Count], JobResult],
    jobs: Sequence[FileJob],
    open_source: Callable[[], WorkerSource],
    workers: int,
    *,
    progress: Count,
) -> dict[str, JobResult]:
    """`function(job, source, count bytes)` for every job; job name -> result. With one worker in this process."""
    if workers <= 1 or len(jobs) <= 1:
        source = open_source()
        try:
            return {job.name: function(job, source, progress) for job in jobs}
        finally:
            source.close()
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    shown = 0
    # The largest first: the last file to finish is then a small one.
    jobs = sorted(jobs, key=lambda job: -job_bytes(job))
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (open_source, counter)) as pool:
        futures = {pool.submit(_work, function, job): job for job in jobs}
        try:
            while not all(future.done() for future in futures):
                time.sleep(0.05)
                progress(counter.value - shown)
                shown = counter.value
                if any(future.done() and future.exception() for future in futures):
                    break
            results = {futures[future].name: future.result() for future in as_completed(futures)}
        except BrokenProcessPool:
            raise UsageError("a worker process was killed (out of memory?); continue with --resume --jobs 1") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    progress(counter.value - shown)
    return results


def workers_of(args: ConvertArgs) -> int:
    """Processes that convert or verify."""
    return args.jobs or min(os.cpu_count() or 1, 4)
