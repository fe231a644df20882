"""Write a Megatron checkpoint in the torch_dist format, as megatron-core's own saving leaves it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import DType, full, sizes
from qwen3_npu.checkpoint.binary.torch_zip_read import PtArchive
from qwen3_npu.checkpoint.binary.torch_zip_write import PtSection, PtWriter, Tensor
from qwen3_npu.checkpoint.formats.base import Item, Record, Stored
from qwen3_npu.checkpoint.formats.dist_keys import Chunk, chunks, extra_states
from qwen3_npu.checkpoint.formats.dist_metadata import StoredChunk, StoredTensor, read_metadata, write_metadata
from qwen3_npu.checkpoint.formats.folders import COMMON, CONFIG, METADATA, TORCH_DIST
from qwen3_npu.checkpoint.formats.torch_write import MegatronOutput, Target, common_content
from qwen3_npu.distributed.layout import Rank
from qwen3_npu.files import flush, write_text

BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclasses.dataclass(frozen=True)
class DistFile:
    """The chunks that one rank saves, one archive after the other; see `FileJob`."""

    target: Target
    rank: Rank
    number: int

    @property
    def name(self) -> str:
        return f"__{self.number}_0.distcp"

    def chunks(self) -> list[Chunk]:
        return list(chunks(self.target.contents, self.target.layout, self.rank))

    def items(self) -> list[Item]:
        return [Item(chunk.label, chunk.shard, self.target.dtype_of(chunk.shard)) for chunk in self.chunks()]

    def write(self, path: Path, tensors: Iterator[np.ndarray]) -> dict[str, Any]:
        """Also gives back where each archive lies: label (or name of an extra state) -> [start, length]."""
        places: dict[str, list[int]] = {}
        with open(path, "wb") as file:
            for chunk, data in zip(self.chunks(), tensors, strict=True):
                places[chunk.label] = _section(
                    file, Tensor(self.target.dtype_of(chunk.shard), sizes(chunk.region)), data
                )
            for name in extra_states(self.target.contents, self.target.layout, self.rank):
                places[name] = _section(file, [None], None)
            flush(file)
        return places

    def stored(self, path: Path) -> dict[str, Stored]:
        fd = os.open(path, os.O_RDONLY)

        def tensor(dtype: DType | None, lead: int, chunk: StoredChunk) -> Stored:
            def read() -> np.ndarray:
                archive = PtArchive(fd, chunk.start, chunk.length, path)
                return archive.read(archive.content, archive.content.shape, full(archive.content.shape))

            return Stored(dtype, sizes(chunk.region)[lead:], read)

        leads = {chunk.label: chunk.lead for chunk in self.chunks()}
        found = {}
        for key, stored in read_metadata(path.parent / METADATA)[0].items():
            for chunk in stored.chunks:
                if chunk.file == path.name:
                    label = f"{key}/{'.'.join(str(start) for start, _ in chunk.region)}"
                    found[label] = tensor(stored.dtype, leads.get(label, 0), chunk)
        return found


def _section(file: Any, content: Any, data: np.ndarray | None) -> list[int]:
    start = file.tell()
    section = PtSection(file, content)
    if data is not None:
        section.write(data)
    section.close()
    return [start, file.tell() - start]


class DistOutput(MegatronOutput):
    """`<root>/iter_0000001` in the torch_dist format; its files are cut as the layout's ranks would save them."""

    format = TORCH_DIST
    jobs: list[DistFile]

    def _jobs(self) -> list[DistFile]:
        jobs = [DistFile(self.target, rank, number) for number, rank in enumerate(self.target.layout.ranks())]
        return [job for job in jobs if job.chunks()]

    def publish(self, records: Mapping[str, Record]) -> None:
        kinds: dict[str, tuple[DType, tuple[int, ...]]] = {}
        stored: dict[str, list[StoredChunk]] = {}
        objects: dict[str, StoredChunk] = {}
        for job in self.jobs:
            places = records[job.name].notes
            for chunk in job.chunks():
                kinds[chunk.key] = self.target.dtype_of(chunk.shard), chunk.size
                stored.setdefault(chunk.key, []).append(StoredChunk(chunk.region, job.name, *places[chunk.label]))
            for name in extra_states(self.target.contents, self.target.layout, job.rank):
                objects[name] = StoredChunk((), job.name, *places[name])
        tensors = {key: StoredTensor(*kinds[key], tuple(parts)) for key, parts in stored.items()}
        write_metadata(self.stage / METADATA, tensors, objects)
        PtWriter(self.stage / COMMON, common_content(self.target)).close()
        write_text(self.stage / CONFIG, json.dumps(BACKENDS))
        super().publish(records)

    def unexpected_files(self) -> list[str]:
        made = {job.name for job in self.jobs}
        return sorted({path.name for path in self.folder.glob("*.distcp")} - made)
