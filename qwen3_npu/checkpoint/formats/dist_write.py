"""Write Megatron checkpoints in the torch_dist format, as megatron-core's own saving leaves them; no process group.

<iteration>/__R_0.distcp     weights of model rank R, and in a training its optimizer's and random state
           /common.pt        args, iteration, and in a training schedule and steps
           /metadata.json    which formats these files have
           /.metadata        keys, shapes and places of all tensors

Weights lie under megatron-core's keys. An optimizer's tensor lies under "optimizer.state.<what>." and the key of its
parameter, the names of megatron-core's fully sharded optimizer, in the whole shape of the parameter. So everything is
read in any layout.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import BY_TORCH, DType, sizes, widest
from qwen3_npu.checkpoint.binary.torch_zip_write import PtSection, Tensor
from qwen3_npu.checkpoint.folders import COMMON, CONFIG, METADATA
from qwen3_npu.checkpoint.formats.dist_keys import Chunk, extra_states, random_key, saved_chunks, state_prefix
from qwen3_npu.checkpoint.formats.dist_metadata import StoredChunk, StoredTensor, read_metadata, write_metadata
from qwen3_npu.checkpoint.formats.torch_write import STATES, RankState, Target, write_archive
from qwen3_npu.checkpoint.mapping.source import FileJob, Item, Stored, is_peft_name
from qwen3_npu.distributed.layout import Rank
from qwen3_npu.files import Seal, SealedFile

BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def jobs(target: Target, rank: Rank, state: RankState | None = None) -> list[FileJob]:
    """The file of one rank, unless it would be empty. `state` is given by trainings only."""
    job = DistFile(target, rank, state)
    return [job] if state is not None or job.chunks() else []


@dataclasses.dataclass(frozen=True)
class DistFile:
    """The chunks that one rank saves, one archive after the other; see `FileJob`."""

    target: Target
    rank: Rank
    state: RankState | None = None

    @property
    def name(self) -> str:
        return f"__{list(self.target.layout.ranks()).index(self.rank)}_0.distcp"

    def chunks(self) -> list[tuple[str, Chunk, DType]]:
        """(state, chunk, dtype) of every tensor."""
        contents, layout = self.target.contents, self.target.layout
        every = list(saved_chunks(contents, layout, self.rank))
        if self.state is None:
            return [("", chunk, self.target.dtype_of(chunk.shard)) for chunk in every]
        found = []
        for key in ("", *STATES):
            held = self.state.held.get(key, {})
            # The layout of what is stored may have other names for tensors than the training's.
            dtypes = {
                piece.hf: held[shard.chunk, shard.name]
                for shard in contents.shards(layout, self.rank)
                if (shard.chunk, shard.name) in held
                for piece in shard.slices
            }
            found += [
                (key, chunk, next(dtypes[piece.hf] for piece in chunk.shard.slices if piece.hf in dtypes))
                for chunk in every
                if any(piece.hf in dtypes for piece in chunk.shard.slices)
            ]
        return found

    def items(self) -> list[Item]:
        return [Item(state_prefix(key) + chunk.label, chunk.shard, dtype, key) for key, chunk, dtype in self.chunks()]

    def write(self, path: Path, tensors: Iterator[np.ndarray]) -> tuple[Seal, object]:
        """Also return where each tensor lies: [key, dtype, size, region, start, length]."""
        placed: list[list[object]] = []
        objects: list[list[Any]] = []
        file = SealedFile(path)
        for (key, chunk, dtype), data in zip(self.chunks(), tensors, strict=True):
            place = _section(file, Tensor(dtype, sizes(chunk.region)), (data,))
            placed.append([state_prefix(key) + chunk.key, dtype.torch, chunk.size, chunk.region, *place])
        for name in extra_states(self.target.contents, self.target.layout, self.rank):
            objects.append([name, *_section(file, [None], ())])
        if self.state is not None and self.state.random is not None:
            name = random_key(self.target.layout, self.rank)
            objects.append([name, *_section(file, self.state.random, self.state.random_data)])
        return file.close(), {"file": self.name, "tensors": placed, "objects": objects}

    def stored(self, path: Path) -> dict[str, Stored]:
        leads = {chunk.label: chunk.lead for _, chunk, _ in self.chunks()}
        found = {}
        for key, stored in read_metadata(path.parent / METADATA)[0].items():
            for chunk in stored.chunks:
                if chunk.file == path.name:
                    label = f"{key}/{'.'.join(str(start) for start, _ in chunk.region)}"
                    found[label] = Stored(stored.dtype, sizes(chunk.region)[leads.get(label, 0) :])
        return found


def _section(file: SealedFile, content: object, tensors: tuple[np.ndarray, ...]) -> list[int]:
    start = file.tell()
    section = PtSection(file, content)
    for data in tensors:
        section.write(data)
    section.close()
    return [start, file.tell() - start]


def finish(target: Target, stage: Path, notes: list[Any]) -> dict[str, Seal]:
    """Write the files that belong to all ranks, from the notes of each rank's file."""
    stored: dict[str, list[StoredChunk]] = {}
    kinds: dict[str, tuple[DType, tuple[int, ...]]] = {}
    objects: dict[str, StoredChunk] = {}
    for said in notes:
        for key, dtype, size, region, start, length in said["tensors"]:
            kinds[key] = BY_TORCH[dtype], tuple(size)
            region = tuple((begin, end) for begin, end in region)
            stored.setdefault(key, []).append(StoredChunk(region, said["file"], start, length))
        for key, start, length in said["objects"]:
            objects[key] = StoredChunk((), said["file"], start, length)
    tensors = {key: StoredTensor(*kinds[key], tuple(parts)) for key, parts in stored.items()}
    config = SealedFile(stage / CONFIG)
    config.write(json.dumps(BACKENDS).encode())
    return {
        METADATA: write_metadata(stage / METADATA, tensors, objects),
        COMMON: write_archive(stage / COMMON, target.common, itertools.chain()),
        CONFIG: config.close(),
    }


def same_in_all_layers(
    dtype: DType, lora_dtype: DType, kept: Mapping[str, DType], every: Iterable[str]
) -> dict[str, DType]:
    """`kept` where one tensor is stored for all layers (and experts), so that all of them have one dtype.

    Gate and up are one tensor too, but their chunks are stored separately, so each keeps its dtype.

    Args:
        dtype, lora_dtype: of the tensors that `kept` does not name.
        every: names of all Hugging Face and PEFT tensors.
    """
    groups: dict[str, list[str]] = {}
    for name in every if kept else ():
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", name).replace(".up_proj.", ".gate_proj."), []).append(name)
    wide: dict[str, DType] = {}
    for names in groups.values():
        usual = lora_dtype if is_peft_name(names[0]) else dtype
        if (found := widest(kept.get(name, usual) for name in names)) is not usual:
            wide |= dict.fromkeys(names, found)
    return wide
