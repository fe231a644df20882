"""Tensors of a torch_dist checkpoint, read by regions wherever their chunks lie. No torch, no process group."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import DType, Region, intersect, relative, sizes
from qwen3_npu.checkpoint.binary.torch_zip_read import PtArchive
from qwen3_npu.checkpoint.formats.dist_keys import key_of, layer_places, possible_keys
from qwen3_npu.checkpoint.formats.dist_metadata import StoredChunk, StoredTensor
from qwen3_npu.checkpoint.mapping.lora import Contents
from qwen3_npu.checkpoint.mapping.shard_reader import Holder, ShardReader
from qwen3_npu.checkpoint.mapping.source import inside
from qwen3_npu.distributed.layout import Layout, Rank
from qwen3_npu.errors import UsageError

_ARCHIVES = 256  # opened archives remembered; a chunk of q, k and v is read a head at a time


class DistTensors(ShardReader[None]):
    """Stored tensors of a model's parameters, or of something of the parameters' shapes (an optimizer's moments).

    Args:
        stored: the tensors under the keys of the parameters.
        contents: which parameters.
        layout: the uncut one (`dist_keys.global_layout`).
    """

    def __init__(self, folder: Path, stored: Mapping[str, StoredTensor], contents: Contents, layout: Layout) -> None:
        self.folder, self.stored, self.contents, self.layout = folder, stored, contents, layout
        self.arch = contents.arch
        self.layers = layer_places(layout)
        self.by_lead: dict[tuple[str, int], dict[tuple[int, ...], list[StoredChunk]]] = {}
        self.files: dict[str, int] = {}
        self.archives: dict[StoredChunk, PtArchive] = {}
        shards = contents.shards(layout, Rank(0, 0, 0, 0))
        super().__init__(((None, shard) for shard in shards), str(folder))

    def key(self, holder: Holder) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """The stored tensor that should hold a holder, the holder's leading indices in it, and how many there are."""
        usual = key_of(holder.shard, self.layers)
        key, lead = next((found for found in possible_keys(*usual) if found[0] in self.stored), usual)
        counts = (self.layout.num_layers, self.arch.num_experts)[: len(usual[1])]
        return key, lead, counts[len(usual[1]) - len(lead) :]

    def find(self, holder: Holder) -> tuple[str, tuple[int, ...]] | None:
        key, lead, counts = self.key(holder)
        if key not in self.stored:
            return None
        if self.stored[key].size != (*counts, *holder.shard.shape):
            shape = self.stored[key].size
            raise UsageError(f"{self.folder}: {key} has shape {shape}; {(*counts, *holder.shard.shape)} expected")
        return key, lead

    def stored_dtype(self, holder: Holder, tensor: tuple[str, tuple[int, ...]]) -> DType:
        dtype = self.stored[tensor[0]].dtype
        if dtype is None:
            raise UsageError(f"{self.folder}: {tensor[0]} is not float32, float16 or bfloat16")
        return dtype

    def read_stored(self, holder: Holder, tensor: tuple[str, tuple[int, ...]], region: Region) -> np.ndarray:
        key, lead = tensor
        wanted = (*((i, i + 1) for i in lead), *region)
        out = np.empty(sizes(wanted), self.stored_dtype(holder, tensor).carrier)
        read = 0
        for chunk in self.chunks(key, lead):
            common = intersect(wanted, chunk.region)
            if common is not None:
                part = self._read_chunk(key, chunk, relative(common, chunk.region))
                inside(out, common, wanted)[...] = part
                read += part.size
        if read != out.size:
            raise UsageError(f"{self.folder}: {key} is not whole: a part of {wanted} lies in no file")
        return out.reshape(sizes(region))

    def chunks(self, key: str, lead: tuple[int, ...]) -> list[StoredChunk]:
        """The chunks of a stored tensor that may hold a part of a layer (an expert) of it."""
        if (key, len(lead)) not in self.by_lead:
            index = self.by_lead.setdefault((key, len(lead)), {})
            for chunk in self.stored[key].chunks:
                for holder in itertools.product(*(range(*span) for span in chunk.region[: len(lead)])):
                    index.setdefault(holder, []).append(chunk)
        return self.by_lead[key, len(lead)].get(lead, [])

    def _read_chunk(self, key: str, chunk: StoredChunk, region: Region) -> np.ndarray:
        if chunk not in self.archives:
            if len(self.archives) >= _ARCHIVES:
                self.archives.pop(next(iter(self.archives)))
            fd, path = self.open(chunk.file), self.folder / chunk.file
            self.archives[chunk] = PtArchive(fd, chunk.start, chunk.length, path)
        archive = self.archives[chunk]
        shape = sizes(chunk.region)
        tensor = archive.content
        if math.prod(getattr(tensor, "shape", ())) != math.prod(shape) or tensor.dtype is not self.stored[key].dtype:
            raise UsageError(f"{archive.path}: the chunk of {key} at byte {chunk.start} is not of {shape}")
        return archive.read(tensor, shape, region)

    def open(self, file: str) -> int:
        if file not in self.files:
            try:
                self.files[file] = os.open(self.folder / file, os.O_RDONLY)
            except OSError as error:
                raise UsageError(f"{self.folder / file} cannot be opened: {error.strerror}") from None
        return self.files[file]

    def close(self) -> None:
        for fd in self.files.values():
            os.close(fd)
