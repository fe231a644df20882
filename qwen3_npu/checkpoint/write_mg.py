"""Write a Megatron checkpoint in the torch format from any source."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwen3_npu.checkpoint.jobs import Record, Written, remove_records, run_jobs
from qwen3_npu.checkpoint.mg_args import to_args
from qwen3_npu.checkpoint.mg_files import TRACKER, WEIGHTS, iteration_name
from qwen3_npu.checkpoint.pt_writer import PtWriter, Tensor
from qwen3_npu.checkpoint.source import Source, read_shard
from qwen3_npu.checkpoint.tensors import DType
from qwen3_npu.checkpoint.weights import Shard, shards
from qwen3_npu.distributed.layout import Layout, Rank
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch

ITERATION = 1  # of a converted checkpoint, as MindSpeed-LLM writes it: loaders treat 0 and "release" specially
CHECKPOINT_VERSION = 3.0  # Megatron's checkpoint_version


@dataclasses.dataclass(frozen=True)
class RankFile:
    """One rank's `model_optim_rng.pt`."""

    arch: Qwen3Arch
    layout: Layout
    rank: Rank
    dtype: DType

    @property
    def name(self) -> str:
        return f"{self.layout.folder(self.rank)}/{WEIGHTS}"

    @property
    def size(self) -> int:
        return sum(math.prod(shard.shape) for shard in self.shards()) * self.dtype.itemsize

    def shards(self) -> Iterator[Shard]:
        return shards(self.arch, self.layout, self.rank)

    def write(self, source: Source, path: Path, written: Written) -> None:
        """Tensor by tensor; see `FileJob`."""
        wanted = list(self.shards())
        models: dict[str, dict[str, Tensor]] = {}
        for chunk in range(self.layout.virtual):
            key = "model" if self.layout.virtual == 1 else f"model{chunk}"
            models[key] = {s.name: Tensor(self.dtype, s.shape) for s in wanted if s.chunk == chunk}
        content: dict[str, Any] = {
            "args": argparse.Namespace(**to_args(self.arch, self.layout, self.dtype), iteration=ITERATION),
            "checkpoint_version": CHECKPOINT_VERSION,
            "iteration": ITERATION,
            **models,
        }
        writer = PtWriter(path, content)
        for shard in wanted:
            data = read_shard(source, shard, self.dtype)
            writer.write(data)
            written(f"model{shard.chunk}.{shard.name}" if self.layout.virtual > 1 else shard.name, data)
        writer.close()


def write_megatron(
    open_source: Callable[[], Source],
    arch: Qwen3Arch,
    root: Path,
    layout: Layout,
    dtype: DType,
    *,
    workers: int = 1,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Record]:
    """Write `<root>/iter_0000001`; the tracker file is left to the caller, who writes it last.

    Raises:
        UsageError: it exists (without `overwrite`), or see `run_jobs`.
    """
    folder = root / iteration_name(ITERATION)
    stage = folder.with_name(folder.name + ".partial")
    if overwrite:
        shutil.rmtree(stage, ignore_errors=True)
    elif folder.exists():
        raise UsageError(f"{folder} exists; give --overwrite to replace it, or another --save-dir")
    jobs = [RankFile(arch, layout, rank, dtype) for rank in layout.ranks()]
    records = run_jobs(jobs, open_source, stage, workers=workers, resume=resume, what="writing Megatron shards")
    remove_records(stage)
    if folder.exists():
        (root / TRACKER).unlink(missing_ok=True)
        shutil.rmtree(folder)
    os.replace(stage, folder)
    return {f"{folder.name}/{name}": record for name, record in records.items()}


def write_tracker(root: Path, text: str) -> None:
    """The tracker file, atomically: it makes the checkpoint visible."""
    temporary = root / (TRACKER + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, root / TRACKER)
