"""Write a Megatron checkpoint in the torch format."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import DType, full, widest
from qwen3_npu.checkpoint.binary.pickles import TensorRef
from qwen3_npu.checkpoint.binary.torch_zip_read import PtFile
from qwen3_npu.checkpoint.binary.torch_zip_write import PtWriter, Tensor
from qwen3_npu.checkpoint.formats.base import FileJob, Item, Output, Record, Stored, remove_records
from qwen3_npu.checkpoint.formats.folders import TORCH, TRACKER, iteration_name, read_tracker
from qwen3_npu.checkpoint.formats.megatron_args import lora_args, to_args
from qwen3_npu.checkpoint.formats.torch_read import WEIGHTS
from qwen3_npu.checkpoint.mapping.lora import Contents, is_lora
from qwen3_npu.checkpoint.mapping.table import Shard
from qwen3_npu.distributed.layout import Layout, Rank, single
from qwen3_npu.files import rename, sync_folder, write_text

ITERATION = 1  # of a converted checkpoint, as MindSpeed-LLM writes it: loaders treat 0 and "release" specially
CHECKPOINT_VERSION = 3.0  # Megatron's checkpoint_version


@dataclasses.dataclass(frozen=True)
class Target:
    """What is written, and how.

    Attributes:
        dtype, lora_dtype: of the model's weights, and of LoRA tensors.
        kept: Hugging Face (and PEFT) names of the tensors that have another dtype. A tensor joined from several has
            the smallest dtype that holds the values of all.
    """

    contents: Contents
    layout: Layout
    dtype: DType
    lora_dtype: DType
    kept: Mapping[str, DType] = dataclasses.field(default_factory=dict)

    def dtype_of(self, shard: Shard) -> DType:
        usual = self.lora_dtype if is_lora(shard.name) else self.dtype
        return widest(self.kept.get(piece.hf, usual) for piece in shard.slices) if self.kept else usual


def common_content(target: Target) -> dict[str, Any]:
    """What every file of a converted checkpoint says beside its tensors."""
    dtype = target.dtype if target.contents.base else target.lora_dtype
    args = to_args(target.contents.arch, target.layout, dtype) | {"iteration": ITERATION}
    if target.contents.lora:
        args |= lora_args(target.contents.lora)
    return {"args": argparse.Namespace(**args), "checkpoint_version": CHECKPOINT_VERSION, "iteration": ITERATION}


@dataclasses.dataclass(frozen=True)
class RankFile:
    """One rank's `model_optim_rng.pt`; see `FileJob`."""

    target: Target
    rank: Rank

    @property
    def name(self) -> str:
        return f"{self.target.layout.folder(self.rank)}/{WEIGHTS}"

    def _key(self, chunk: int) -> str:
        return "model" if self.target.layout.virtual == 1 else f"model{chunk}"

    def items(self) -> list[Item]:
        # Chunk by chunk, as the dicts of the file are: that is the order in which its tensors are announced.
        shards = sorted(self.target.contents.shards(self.target.layout, self.rank), key=lambda shard: shard.chunk)
        return [Item(f"{self._key(s.chunk)}.{s.name}", s, self.target.dtype_of(s)) for s in shards]

    def write(self, path: Path, tensors: Iterator[np.ndarray]) -> dict[str, Any]:
        models: dict[str, dict[str, Tensor]] = {self._key(chunk): {} for chunk in range(self.target.layout.virtual)}
        for _, shard, dtype in self.items():
            models[self._key(shard.chunk)][shard.name] = Tensor(dtype, shard.shape)
        writer = PtWriter(path, common_content(self.target) | models)
        for data in tensors:
            writer.write(data)
        writer.close()
        return {}

    def stored(self, path: Path) -> dict[str, Stored]:
        file = PtFile(path)

        def tensor(ref: TensorRef) -> Stored:
            return Stored(ref.dtype, ref.shape, lambda: file.read(ref, ref.shape, full(ref.shape)))

        models = {key: value for key, value in file.content.items() if key.startswith("model")}
        return {f"{key}.{name}": tensor(ref) for key, model in models.items() for name, ref in model.items()}


def joined(target: Target) -> list[str]:
    """Tensors made of several dtypes, in a model in one piece."""
    if not target.kept:
        return []
    shards = target.contents.shards(single(target.contents.arch), Rank(0, 0, 0, 0))
    usual = {True: target.lora_dtype, False: target.dtype}
    return [s.name for s in shards if len({target.kept.get(p.hf, usual[is_lora(s.name)]) for p in s.slices}) > 1]


class MegatronOutput(Output):
    """`<root>/iter_0000001` in the torch format; the tracker file comes last."""

    format = TORCH

    def __init__(self, root: Path, target: Target) -> None:
        self.root, self.target = root, target
        self.folder = root / iteration_name(ITERATION)
        self.stage = self.folder.with_name(self.folder.name + ".partial")
        self.jobs = self._jobs()

    def _jobs(self) -> Sequence[FileJob]:
        return [RankFile(self.target, rank) for rank in self.target.layout.ranks()]

    def facts(self) -> dict[str, Any]:
        dtypes: dict[str, Any] = {"dtype": self.target.dtype.torch} if self.target.contents.base else {}
        if self.target.contents.lora:
            dtypes |= {"lora_dtype": self.target.lora_dtype.torch}
        if self.target.kept:
            dtypes["kept"] = {name: dtype.torch for name, dtype in self.target.kept.items()}
        layout = dataclasses.asdict(self.target.layout)
        return {"format": self.format, **dtypes, "contents": str(self.target.contents), "layout": layout}

    def existing(self) -> str | None:
        if (tracked := read_tracker(self.root)) is not None:
            return f"{self.root} already holds a checkpoint ({TRACKER} says {tracked})"
        return f"{self.folder} exists" if self.folder.exists() else None

    def publish(self, records: Mapping[str, Record]) -> None:
        remove_records(self.stage)
        if self.folder.exists():
            (self.root / TRACKER).unlink(missing_ok=True)
            shutil.rmtree(self.folder)
        rename(self.stage, self.folder)
        sync_folder(self.root)

    def commit(self) -> None:
        write_tracker(self.root, str(ITERATION))

    def unexpected_files(self) -> list[str]:
        made = {job.name for job in self.jobs}
        found = {str(path.relative_to(self.folder)) for path in self.folder.glob(f"*/{WEIGHTS}")}
        return sorted(found - made)


def write_tracker(root: Path, text: str) -> None:
    """The tracker file, atomically: it makes the checkpoint visible."""
    write_text(root / TRACKER, text)
