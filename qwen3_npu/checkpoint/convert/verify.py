"""Compare an output with its source, both on disk, tensor by tensor and bit for bit.

Every tensor of every output file is made again from the source through the weight table and held against the file's,
so copies on several ranks and padded rows are compared too. The bytes of both are read by the safetensors library and
by torch, not by the code that converted them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qwen3_npu.checkpoint.binary.dtypes import same_bits
from qwen3_npu.checkpoint.convert.jobs import in_processes
from qwen3_npu.checkpoint.convert.library import output_reader
from qwen3_npu.checkpoint.formats.base import FileJob, job_bytes
from qwen3_npu.checkpoint.manifest import Count
from qwen3_npu.checkpoint.mapping.source import Source, read_shard
from qwen3_npu.errors import UsageError
from qwen3_npu.progress import Progress


class _Compare:
    """Compares one file; its differences, a line each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, job: FileJob, source: Source, count: Count) -> tuple[list[str], int]:
        """The differences, and how many tensors are of another dtype than their source."""
        lines = list(self._differences(job, source, count))
        items = ((item.dtype, {piece.hf for piece in item.shard.slices}) for item in job.items())
        return lines, sum(any(source.dtype(name) is not dtype for name in names) for dtype, names in items)

    def _differences(self, job: FileJob, source: Source, count: Count) -> Iterator[str]:
        path = self.folder / job.name
        if not path.is_file():
            yield f"missing file: {job.name}"
            return
        try:
            stored, library = job.stored(path), output_reader(path)
        except UsageError as error:
            yield f"unreadable file: {error}"
            return
        items = job.items()
        names = {item.name for item in items}
        yield from (f"missing: {job.name}: {name}" for name in sorted(names - stored.keys()))
        yield from (f"extra: {job.name}: {name}" for name in sorted(stored.keys() - names))
        for name, shard, wanted, _ in items:
            if name not in stored:
                continue
            dtype, shape = stored[name]
            if shape != shard.shape or dtype is not wanted:
                said = f"{list(shape)} {dtype.torch if dtype else 'of another dtype'}"
                yield f"differs: {job.name}: {name} is {said}, not {list(shard.shape)} {wanted.torch}"
                continue
            expected = read_shard(source, shard, wanted)
            try:
                same = same_bits(expected, library(name).reshape(shape))
            except UsageError as error:
                yield f"unreadable: {job.name}: {name}: {error}"
                continue
            if not same:
                yield f"differs: {job.name}: {name}"
            count(expected.nbytes)


def differences(
    jobs: Sequence[FileJob], open_source: Callable[[], Source], folder: Path, workers: int
) -> tuple[list[str], int, int]:
    """What is missing, extra or different in the files of `jobs`, a line each.

    Returns:
        The lines, how many tensors were compared, and how many of them were converted to another dtype.
    """
    with Progress("comparing", sum(map(job_bytes, jobs)), {"bytes": "B"}) as progress:
        found = in_processes(
            _Compare(folder), jobs, open_source, workers, progress=lambda count: progress.add(bytes=count)
        )
    lines = [line for job in jobs for line in found[job.name][0]]
    return lines, sum(len(job.items()) for job in jobs), sum(converted for _, converted in found.values())
