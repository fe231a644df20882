"""A training's state in the torch_dist format, written through the weight table: no process group takes part.

<root>/iter_0000010/__R_0.distcp     weights, optimizer state and random state of model rank R
                   /common.pt        args, schedule, steps
                   /.metadata        keys, shapes and places of all that

Weights lie under megatron-core's keys. An optimizer's tensor lies under "optimizer.state.<what>." and the key of its
parameter, the names of megatron-core's fully sharded optimizer, in the whole shape of the parameter. So everything is
read in any layout.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

from qwen3_npu.checkpoint.binary.dtypes import BY_TORCH, DType, sizes
from qwen3_npu.checkpoint.binary.torch_zip_read import PtArchive
from qwen3_npu.checkpoint.binary.torch_zip_write import PtSection
from qwen3_npu.checkpoint.formats.dist_keys import chunks, extra_states
from qwen3_npu.checkpoint.formats.dist_metadata import StoredChunk, StoredTensor, write_metadata
from qwen3_npu.checkpoint.formats.dist_read import DistReader
from qwen3_npu.checkpoint.formats.dist_write import BACKENDS
from qwen3_npu.checkpoint.formats.folders import COMMON, CONFIG, METADATA
from qwen3_npu.checkpoint.mapping.lora import Contents
from qwen3_npu.checkpoint.mapping.source import Source, read_shard
from qwen3_npu.checkpoint.training.live import LiveTensors, Snapshot, announce, to_torch, write_content, write_tensors
from qwen3_npu.checkpoint.training.optimizer_state import KEYS
from qwen3_npu.distributed.layout import Layout, Rank
from qwen3_npu.files import flush, write_text


def _prefix(key: str) -> str:
    return f"optimizer.state.{key}."


def _random_key(layout: Layout, rank: Rank) -> str:
    ranks = list(layout.ranks())
    return f"rng_state/shard_{ranks.index(rank)}_{len(ranks)}"


def write(snapshot: Snapshot, stage: Path) -> tuple[list[str], Any]:
    """Make the file of one model rank; its name, and what lies where in it."""
    contents, layout, rank = snapshot.contents, snapshot.layout, snapshot.rank
    groups = {"": snapshot.parameters}
    if snapshot.optimizer is not None:
        for key in KEYS:
            groups[_prefix(key)] = {parameter: tensors[key] for parameter, tensors in snapshot.optimizer.items()}
    name = f"__{list(layout.ranks()).index(rank)}_0.distcp"
    tensors: list[list[Any]] = []
    objects: list[list[Any]] = []
    with open(stage / name, "wb") as file:
        for prefix, held in groups.items():
            source = LiveTensors(held, contents, layout, rank)
            for chunk in chunks(contents, layout, rank):
                if not source.holds(chunk.shard):
                    continue
                dtype = source.dtype(chunk.shard.slices[0].hf)
                data = read_shard(source, chunk.shard, dtype).reshape(sizes(chunk.region))
                place = _section(file, to_torch(data, dtype))
                tensors.append([prefix + chunk.key, dtype.torch, chunk.size, chunk.region, *place])
        for key in extra_states(contents, layout, rank):
            objects.append([key, *_section(file, [None])])
        if snapshot.random is not None:
            objects.append([_random_key(layout, rank), *_section(file, snapshot.random)])
        flush(file)
    return [name], {"file": name, "tensors": tensors, "objects": objects}


def _section(file: BinaryIO, content: Any) -> list[int]:
    start = file.tell()
    announced, tensors = announce(content)
    write_tensors(PtSection(file, announced), tensors)
    return [start, file.tell() - start]


def finish(snapshot: Snapshot, stage: Path, notes: list[Any]) -> list[str]:
    """Make the files that belong to all ranks from what each said of its own; their names."""
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
    write_metadata(stage / METADATA, tensors, objects)
    write_content(stage / COMMON, snapshot.common | {"optimizer_step": snapshot.step})
    write_text(stage / CONFIG, json.dumps(BACKENDS))
    return [METADATA, COMMON, CONFIG]


class DistState:
    """What a checkpoint holds of a training; see `torch_files.TorchState`."""

    def __init__(self, reader: DistReader) -> None:
        self.weights = reader
        self.folder, self.layout, self.common = reader.folder, reader.saved_layout(), reader.common

    @property
    def has_optimizer(self) -> bool:
        return "optimizer_step" in self.common and any(k.startswith(_prefix("param")) for k in self.weights.everything)

    @property
    def step(self) -> int:
        """Updates made."""
        return self.common["optimizer_step"]

    def optimizer(self, key: str, contents: Contents, rank: Rank) -> Source:
        """One of `optimizer_state.KEYS` of every trained parameter."""
        return self.weights.under(_prefix(key))

    def random(self, rank: Rank) -> tuple[dict[str, Any], PtArchive] | None:
        """States of the random generators of one rank, and the archive that their tensors are in."""
        key = _random_key(self.layout, rank)
        if key not in self.weights.objects:
            return None
        archive = self.weights.object(key)
        return archive.content, archive

    def close(self) -> None:
        self.weights.close()
