"""Megatron checkpoints in the torch_dist format, read by regions. No torch, no process group.

<root>/iter_0000001/.metadata        which tensors there are and where their chunks lie (`dist_metadata.py`)
                   /metadata.json    {"sharded_backend": "torch_dist", ...}
                   /common.pt        {'args', 'iteration', ...}
                   /__R_N.distcp     chunks, each a torch.save archive
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
from pathlib import Path

import numpy as np

from qwen3_npu.checkpoint.cuts import Region, intersect, relative
from qwen3_npu.checkpoint.dist_metadata import StoredChunk, read_metadata
from qwen3_npu.checkpoint.dist_table import key_of, layer_places, possible_keys, whole
from qwen3_npu.checkpoint.lora_table import Contents, is_lora
from qwen3_npu.checkpoint.mg_args import layout_from_args, lora_from_args
from qwen3_npu.checkpoint.mg_files import architecture
from qwen3_npu.checkpoint.mg_folder import COMMON, CONFIG, METADATA, TORCH_DIST, checkpoint_folder
from qwen3_npu.checkpoint.piece_reader import PieceReader, Place
from qwen3_npu.checkpoint.pt_reader import PtArchive, PtFile
from qwen3_npu.checkpoint.source import check_tensors, inside
from qwen3_npu.checkpoint.tensors import DType, full, sizes
from qwen3_npu.checkpoint.weights import EMBEDDING
from qwen3_npu.distributed.layout import Layout, Rank
from qwen3_npu.errors import UsageError
from qwen3_npu.numbers import number_list

_MODEL = ("embedding.", "decoder.", "output_layer.")  # keys of weights; the optimizer's begin with "optimizer."
_ARCHIVES = 256  # opened archives remembered; a chunk of q, k and v is read a head at a time


class DistReader(PieceReader[None]):
    """What a torch_dist checkpoint holds (one side of conversions; see `source.py`).

    Attributes:
        contents: which tensors: a model's, an adapter's, or both.
        layout: the uncut one, with the places without weights that the training had.
    """

    format = TORCH_DIST

    def __init__(
        self,
        root: str | Path,
        iteration: int | None = None,
        hf_config: str | Path | None = None,
        lora_alpha: float | None = None,
    ) -> None:
        """Find out architecture and contents.

        Raises:
            UsageError: not a whole checkpoint, or it does not say what it is.
        """
        self.folder = checkpoint_folder(root, iteration)
        for name in (METADATA, CONFIG, COMMON):
            if not (self.folder / name).is_file():
                raise UsageError(f"{self.folder} has no {name}; the torch_dist checkpoint is not whole")
        common = PtFile(self.folder / COMMON)
        common.close()
        self.args: argparse.Namespace = common.content.get("args", argparse.Namespace())
        self.arch = architecture(Path(root), hf_config, self.args)
        tensors = read_metadata(self.folder / METADATA)
        self.stored = {key: tensor for key, tensor in tensors.items() if key.startswith(_MODEL)}
        shapes = {key: tensor.size for key, tensor in self.stored.items()}
        lora = lora_from_args(self.args, shapes, lora_alpha, str(self.folder))
        self.contents = Contents(self.arch, base=not all(map(is_lora, shapes)), lora=lora)
        padded = shapes.get(EMBEDDING.megatron, (self.arch.vocab_size,))[0]
        self.layout = whole(self.arch, padded, number_list(getattr(self.args, "noop_layers", None)))
        self.layers = layer_places(self.layout)
        self.by_lead: dict[tuple[str, int], dict[tuple[int, ...], list[StoredChunk]]] = {}
        self.files: dict[str, int] = {}
        self.archives: dict[StoredChunk, PtArchive] = {}
        shards = self.contents.shards(self.layout, Rank(0, 0, 0, 0))
        super().__init__(((None, shard) for shard in shards), str(self.folder))

    def _key(self, place: Place) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """The stored tensor that should hold a place, the place's leading indices in it, and how many there are."""
        usual = key_of(place.shard, self.layers)
        key, lead = next((found for found in possible_keys(*usual) if found[0] in self.stored), usual)
        counts = (self.layout.num_layers, self.arch.num_experts)[: len(usual[1])]
        return key, lead, counts[len(usual[1]) - len(lead) :]

    def find(self, place: Place) -> tuple[str, tuple[int, ...]] | None:
        key, lead, counts = self._key(place)
        if key not in self.stored:
            return None
        if self.stored[key].size != (*counts, *place.shard.shape):
            shape = self.stored[key].size
            raise UsageError(f"{self.folder}: {key} has shape {shape}; {(*counts, *place.shard.shape)} expected")
        return key, lead

    def stored_dtype(self, place: Place, tensor: tuple[str, tuple[int, ...]]) -> DType:
        dtype = self.stored[tensor[0]].dtype
        if dtype is None:
            raise UsageError(f"{self.folder}: {tensor[0]} is not float32, float16 or bfloat16")
        return dtype

    def read_stored(self, place: Place, tensor: tuple[str, tuple[int, ...]], region: Region) -> np.ndarray:
        key, lead = tensor
        wanted = (*((i, i + 1) for i in lead), *region)
        out = np.empty(sizes(wanted), self.stored_dtype(place, tensor).carrier)
        read = 0
        for chunk in self._chunks(key, lead):
            common = intersect(wanted, chunk.region)
            if common is not None:
                part = self._read_chunk(key, chunk, relative(common, chunk.region))
                inside(out, common, wanted)[...] = part
                read += part.size
        if read != out.size:
            raise UsageError(f"{self.folder}: {key} is not whole: a part of {wanted} lies in no file")
        return out.reshape(sizes(region))

    def _chunks(self, key: str, lead: tuple[int, ...]) -> list[StoredChunk]:
        """The chunks of a stored tensor that may hold a part of a layer (an expert) of it."""
        if (key, len(lead)) not in self.by_lead:
            index = self.by_lead.setdefault((key, len(lead)), {})
            for chunk in self.stored[key].chunks:
                for place in itertools.product(*(range(*span) for span in chunk.region[: len(lead)])):
                    index.setdefault(place, []).append(chunk)
        return self.by_lead[key, len(lead)].get(lead, [])

    def _read_chunk(self, key: str, chunk: StoredChunk, region: Region) -> np.ndarray:
        if chunk not in self.archives:
            if len(self.archives) >= _ARCHIVES:
                self.archives.pop(next(iter(self.archives)))
            fd, path = self._open(chunk.file), self.folder / chunk.file
            self.archives[chunk] = PtArchive(fd, chunk.start, chunk.length, path)
        archive = self.archives[chunk]
        shape = sizes(chunk.region)
        tensor = archive.content
        if math.prod(getattr(tensor, "shape", ())) != math.prod(shape) or tensor.dtype is not self.stored[key].dtype:
            raise UsageError(f"{archive.path}: the chunk of {key} at byte {chunk.start} is not of {shape}")
        return archive.read(tensor, shape, region)

    def _open(self, file: str) -> int:
        if file not in self.files:
            try:
                self.files[file] = os.open(self.folder / file, os.O_RDONLY)
            except OSError as error:
                raise UsageError(f"{self.folder / file} cannot be opened: {error.strerror}") from None
        return self.files[file]

    def check(self) -> None:
        """All tensors are there, of their shape, and no other; their chunks fill them; the files are long enough.

        Raises:
            UsageError: something is missing, damaged or not expected.
        """
        places = [place for regions in self.places.values() for holders in regions.values() for place in holders]
        by_name = {place.shard.name: (place, *self._key(place)) for place in places}
        wanted = {key: (*counts, *place.shard.shape) for place, key, _, counts in by_name.values()}
        found = {key: t.size for key, t in self.stored.items() if not key.endswith("_extra_state")}
        check_tensors(found, wanted, str(self.folder), f"this {'MoE' if self.arch.is_moe else 'dense'} model")
        for place, key, lead, _ in by_name.values():
            whole_shard = (*((i, i + 1) for i in lead), *full(place.shard.shape))
            parts = [intersect(whole_shard, chunk.region) for chunk in self._chunks(key, lead)]
            if sum(math.prod(sizes(part)) for part in parts if part) != math.prod(place.shard.shape):
                raise UsageError(f"{self.folder}: {key} is not whole: a part of {place.shard.name} lies in no file")
        ends: dict[str, int] = {}
        for chunk in (chunk for key in wanted for chunk in self.stored[key].chunks):
            ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
        for file, end in ends.items():
            there = os.fstat(self._open(file)).st_size
            if there < end:
                raise UsageError(f"{self.folder / file} is truncated: {end} bytes expected, {there} there")

    def saved_layout(self) -> Layout:
        """The layout in which it was saved; its files are cut so."""
        return layout_from_args(
            self.args,
            self.arch,
            padded_vocab_size=self.layout.padded_vocab_size,
            virtual=getattr(self.args, "virtual_pipeline_model_parallel_size", None) or 1,
            stacked_experts=True,
        )

    def __str__(self) -> str:
        return f"torch_dist, {self.contents}"

    def close(self) -> None:
        for fd in self.files.values():
            os.close(fd)
