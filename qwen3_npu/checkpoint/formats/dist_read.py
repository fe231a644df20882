"""Megatron checkpoints in the torch_dist format, read by regions. No torch, no process group.

<root>/iter_0000001/.metadata        which tensors there are and where their chunks lie (`dist_metadata.py`)
                   /metadata.json    {"sharded_backend": "torch_dist", ...}
                   /common.pt        {'args', 'iteration', ...}
                   /__R_N.distcp     chunks, each a torch.save archive
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import DType, Region, full, intersect, relative, sizes
from qwen3_npu.checkpoint.binary.torch_zip_read import PtArchive, PtFile, TensorRef
from qwen3_npu.checkpoint.folders import COMMON, CONFIG, METADATA, TORCH_DIST, StoredModel
from qwen3_npu.checkpoint.formats.dist_keys import global_layout, key_of, layer_places, possible_keys
from qwen3_npu.checkpoint.formats.dist_metadata import StoredChunk, StoredTensor, read_metadata
from qwen3_npu.checkpoint.formats.megatron_args import layout_from_args, lora_from_args, own_dtypes
from qwen3_npu.checkpoint.formats.torch_read import architecture, saved_args
from qwen3_npu.checkpoint.mapping.source import Contents, ShardReader, SliceLocation, check_tensors, is_lora, view_of
from qwen3_npu.checkpoint.mapping.table import EMBEDDING
from qwen3_npu.distributed.layout import Layout, Rank
from qwen3_npu.errors import UsageError
from qwen3_npu.numbers import number_list
from qwen3_npu.schema import open_regular, read_record, shown

_MODEL = (
    "embedding.",
    "decoder.",
    "output_layer.",
    "score.",
)  # keys of weights; the optimizer's begin with "optimizer."
_ARCHIVES = 256  # opened archives remembered; a chunk of q, k and v is read a head at a time


class DistTensors(ShardReader[None]):
    """Stored tensors of the parameters, or of values that have the parameters' shapes (an optimizer's moments).

    Args:
        stored: the tensors under the keys of the parameters.
        contents: which parameters.
        layout: the unsharded one (`dist_keys.global_layout`).
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

    def key(self, holder: SliceLocation) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """The stored tensor that contains a shard, the shard's leading indices in it, and the sizes of those."""
        usual = key_of(holder.shard, self.layers)
        key, lead = next((found for found in possible_keys(*usual) if found[0] in self.stored), usual)
        counts = (self.layout.num_layers, self.arch.num_experts)[: len(usual[1])]
        return key, lead, counts[len(usual[1]) - len(lead) :]

    def find(self, holder: SliceLocation) -> tuple[str, tuple[int, ...]] | None:
        key, lead, counts = self.key(holder)
        if key not in self.stored:
            return None
        if self.stored[key].size != (*counts, *holder.shard.shape):
            shape = self.stored[key].size
            raise UsageError(f"{self.folder}: {key} has shape {shape}; {(*counts, *holder.shard.shape)} expected")
        return key, lead

    def stored_dtype(self, holder: SliceLocation, tensor: tuple[str, tuple[int, ...]]) -> DType:
        dtype = self.stored[tensor[0]].dtype
        if dtype is None:
            raise UsageError(f"{self.folder}: {tensor[0]} is not float32, float16 or bfloat16")
        return dtype

    def read_stored(self, holder: SliceLocation, tensor: tuple[str, tuple[int, ...]], region: Region) -> np.ndarray:
        key, lead = tensor
        wanted = (*((i, i + 1) for i in lead), *region)
        out = np.empty(sizes(wanted), self.stored_dtype(holder, tensor).carrier)
        read = 0
        for chunk in self.chunks(key, lead):
            common = intersect(wanted, chunk.region)
            if common is not None:
                part = self._read_chunk(key, chunk, relative(common, chunk.region))
                view_of(out, common, wanted)[...] = part
                read += part.size
        if read != out.size:
            raise UsageError(f"{self.folder}: {key} is incomplete: a part of {wanted} lies in no file")
        return out.reshape(sizes(region))

    def chunks(self, key: str, lead: tuple[int, ...]) -> list[StoredChunk]:
        """The chunks of a stored tensor that can hold a part of a given layer (and expert)."""
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
        is_whole = isinstance(tensor, TensorRef) and math.prod(tensor.shape) == math.prod(shape)
        if not is_whole or tensor.dtype is not self.stored[key].dtype:
            raise UsageError(f"{archive.path}: the chunk of {key} at byte {chunk.start} is not of {shape}")
        return archive.read(tensor, shape, region)

    def open(self, file: str) -> int:
        if file not in self.files:
            self.files[file] = open_regular(self.folder / file)
        return self.files[file]

    def close(self) -> None:
        for fd in self.files.values():
            os.close(fd)


class DistReader(DistTensors):
    """What a torch_dist checkpoint holds (one side of conversions; see `source.py`).

    Attributes:
        contents: which tensors: a model's, an adapter's, or both.
        layout: the unsharded one, with the no-op layers that the training had.
        common: what `common.pt` holds.
    """

    format = TORCH_DIST

    def __init__(
        self,
        found: StoredModel,
        hf_config: str | Path | None = None,
        lora_alpha: float | None = None,
        ignored: Collection[str] = (),
    ) -> None:
        """Read architecture and contents.

        Raises:
            UsageError: the checkpoint is incomplete, or does not say which model it holds.
        """
        folder = found.folder
        for name in (METADATA, CONFIG, COMMON):
            if not (folder / name).is_file():
                raise UsageError(f"{folder} has no {name}; the torch_dist checkpoint is incomplete")
        backend = read_record(folder / CONFIG).text("sharded_backend")
        if backend != TORCH_DIST:
            raise UsageError(f"{folder / CONFIG}: sharded_backend {shown(backend)} is not read here; {TORCH_DIST} is")
        common = PtFile(folder / COMMON)
        common.close()
        self.args = saved_args(common, ignored)
        self.common: dict[str, Any] = common.content
        arch = architecture(found.home, hf_config, self.args)
        self.everything, self.objects = read_metadata(folder / METADATA)
        stored = {key: tensor for key, tensor in self.everything.items() if key.startswith(_MODEL)}
        shapes = {key: tensor.size for key, tensor in stored.items()}
        lora = lora_from_args(self.args, shapes, lora_alpha, str(folder))
        contents = Contents(arch, base=not all(map(is_lora, shapes)), lora=lora)
        said = getattr(self.args, "padded_vocab_size", None) or arch.vocab_size  # an adapter has no embedding
        padded = shapes.get(EMBEDDING.megatron, (said,))[0]
        layout = global_layout(arch, padded, number_list(getattr(self.args, "noop_layers", None)))
        super().__init__(folder, stored, contents, layout)
        self.own = own_dtypes(self.args, contents.shapes(), str(folder))

    def under(self, prefix: str) -> DistTensors:
        """The stored tensors whose keys are a prefix and the key of a parameter."""
        stored = {k.removeprefix(prefix): tensor for k, tensor in self.everything.items() if k.startswith(prefix)}
        return DistTensors(self.folder, stored, self.contents, self.layout)

    def object(self, key: str) -> PtArchive:
        """A stored object; it may hold tensors of its own."""
        chunk = self.objects[key]
        return PtArchive(self.open(chunk.file), chunk.start, chunk.length, self.folder / chunk.file)

    def check(self) -> None:
        """Check that exactly the expected tensors exist, with their shapes and all chunks, and that no file is short.

        Raises:
            UsageError: something is missing, damaged or not expected.
        """
        places = [holder for regions in self.places.values() for holders in regions.values() for holder in holders]
        by_name = {holder.shard.name: (holder, *self.key(holder)) for holder in places}
        wanted = {key: (*counts, *holder.shard.shape) for holder, key, _, counts in by_name.values()}
        found = {key: t.size for key, t in self.stored.items() if not key.endswith("_extra_state")}
        check_tensors(found, wanted, str(self.folder), f"this {'MoE' if self.arch.is_moe else 'dense'} model")
        for holder, key, lead, _ in by_name.values():
            whole_shard = (*((i, i + 1) for i in lead), *full(holder.shard.shape))
            parts = [intersect(whole_shard, chunk.region) for chunk in self.chunks(key, lead)]
            if sum(math.prod(sizes(part)) for part in parts if part) != math.prod(holder.shard.shape):
                raise UsageError(f"{self.folder}: {key} is incomplete: a part of {holder.shard.name} lies in no file")
        ends: dict[str, int] = {}
        for chunk in (chunk for key in wanted for chunk in self.stored[key].chunks):
            ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
        for file, end in ends.items():
            there = os.fstat(self.open(file)).st_size
            if there < end:
                raise UsageError(f"{self.folder / file} is truncated: {end} bytes expected, {there} there")

    def saved_layout(self) -> Layout:
        """The layout in which it was saved, hence that of its files."""
        return layout_from_args(
            self.args,
            self.arch,
            padded_vocab_size=self.layout.padded_vocab_size,
            virtual=getattr(self.args, "virtual_pipeline_model_parallel_size", None) or 1,
            stacked_experts=True,
        )

    def __str__(self) -> str:
        return f"torch_dist, {self.contents}"
