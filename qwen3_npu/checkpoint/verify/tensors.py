"""The sources of --verify: tensors under Hugging Face and PEFT names, read by the safetensors library and torch.

`published.py` and `shares.py` say where they lie in Megatron's files. The readers of conversions only provide the kind
of a folder, its architecture and the sizes of its layout.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import io
import itertools
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qwen3_npu.checkpoint.folders import METADATA
from qwen3_npu.checkpoint.formats.dist_read import DistReader
from qwen3_npu.checkpoint.formats.huggingface import HfReader
from qwen3_npu.checkpoint.formats.torch_read import WEIGHTS, MegatronReader
from qwen3_npu.checkpoint.mapping.source import Contents
from qwen3_npu.checkpoint.verify import published, shares
from qwen3_npu.checkpoint.verify.libraries import NORMS, dist_metadata, failed, torch_tensors
from qwen3_npu.checkpoint.verify.published import Span, WholeMatrix
from qwen3_npu.checkpoint.verify.shares import ShardSizes, StripPiece
from qwen3_npu.errors import UsageError

_MODEL = ("embedding.", "decoder.", "output_layer.", "score.")  # keys of weights


class VerifySource(abc.ABC):
    """Tensors as matrices; a vector has one column."""

    @abc.abstractmethod
    def dtypes(self, name: str) -> set[torch.dtype]:
        """The dtypes of the parts of a tensor."""

    @abc.abstractmethod
    def read(self, name: str, rows: Span, columns: Span) -> torch.Tensor:
        """A part of a tensor. Raises: UsageError: it is missing, or cannot be read."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close the files."""


class HfTensors(VerifySource):
    """A Hugging Face directory. FP8 weights are multiplied by the scales of their blocks."""

    def __init__(self, reader: HfReader) -> None:
        self.files: dict[str, Any] = {}
        for file in reader.files:
            opened: Any = safe_open(file.path, framework="pt")
            self.files |= dict.fromkeys(opened.keys(), opened)
        self.blocks = {name: scaled.block for name, scaled in reader.scaled.items()}
        self.dtype = {name: getattr(torch, scaled.dtype.torch) for name, scaled in reader.scaled.items()}

    def dtypes(self, name: str) -> set[torch.dtype]:
        return {self.dtype.get(name) or self.files[name].get_slice(name)[:0].dtype}

    def read(self, name: str, rows: Span, columns: Span) -> torch.Tensor:
        stored = self.files[name].get_slice(name)
        if len(stored.get_shape()) == 1:
            return stored[slice(*rows)].unsqueeze(1)
        tensor = stored[slice(*rows), slice(*columns)]
        if name in self.blocks:
            scales = self.files[f"{name}_scale_inv"].get_tensor(f"{name}_scale_inv").float()
            for axis, (span, size) in enumerate(zip((rows, columns), self.blocks[name], strict=True)):
                scales = scales.index_select(axis, torch.arange(*span) // size)
            tensor = (tensor.float() * scales).to(self.dtype[name])
        return tensor

    def left_out(self, names: Collection[str]) -> list[str]:
        """Other tensors than these: neither a scale of one nor a copy of the embedding."""
        others = sorted(self.files.keys() - set(names) - {f"{name}_scale_inv" for name in self.blocks})
        return [name for name in others if name != "lm_head.weight" or not self._is_tied()]

    def _is_tied(self) -> bool:
        head, embedding = (self.files[n].get_tensor(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
        return torch.equal(head, embedding)

    def close(self) -> None:
        self.files.clear()


@dataclasses.dataclass(frozen=True)
class _Place:
    """A part of a tensor: a function that reads its matrix, and its dtype."""

    piece: StripPiece
    dtype: torch.dtype
    block: Callable[[], torch.Tensor]


class PieceTensors(VerifySource):
    """Tensors that are joined from parts.

    Args:
        places: all parts; the first of several copies is read.
        own: name -> original dtype, of tensors that were stored in a wider dtype to be joined with others.
    """

    def __init__(self, places: Iterator[_Place], own: dict[str, torch.dtype], what: str) -> None:
        self.own, self.what = own, what
        self.places: dict[str, dict[tuple[Span, Span], _Place]] = {}
        for place in places:
            piece = place.piece
            if not piece.copy:
                self.places.setdefault(piece.hf, {}).setdefault((piece.rows, piece.columns), place)

    def dtypes(self, name: str) -> set[torch.dtype]:
        if name in self.own:
            return {self.own[name]}
        return {place.dtype for place in self.places.get(name, {}).values()}

    def read(self, name: str, rows: Span, columns: Span) -> torch.Tensor:
        stored = {place.dtype for place in self.places.get(name, {}).values()}
        out = torch.empty(
            rows[1] - rows[0], columns[1] - columns[0], dtype=stored.pop() if len(stored) == 1 else torch.float32
        )
        filled = 0
        for ((top, bottom), (left, right)), place in self.places.get(name, {}).items():
            low, high = max(rows[0], top), min(rows[1], bottom)
            first, last = max(columns[0], left), min(columns[1], right)
            if low < high and first < last:
                part = place.block()[low - top : high - top, first - left : last - left]
                out[low - rows[0] : high - rows[0], first - columns[0] : last - columns[0]] = part
                filled += part.numel()
        if filled != out.numel():
            raise UsageError(f"{self.what}: a part of {name} lies in no file")
        return out

    def close(self) -> None:
        self.places.clear()


def stored_matrix(tensor: torch.Tensor, stack: tuple[int, int, int] | None, expert: int | None) -> torch.Tensor:
    """A tensor of a file as the matrix whose rows its pieces describe."""
    if stack is not None and expert is not None:
        return tensor.reshape(stack)[expert].T
    return tensor.reshape(tensor.shape[0], -1)


def torch_places(folder: Path, contents: Contents, sizes: ShardSizes) -> Iterator[_Place]:
    """Every part in a folder of the torch format."""
    opened = functools.cache(torch_tensors)
    for name, rank in sizes.ranks().items():
        tensors = opened(folder / name / WEIGHTS)
        for key, held in shares.rank_tensors(contents, sizes, rank).items():
            tensor = tensors.get(key)
            if tensor is None:
                continue
            for piece in held.pieces:
                block = functools.partial(piece_rows, tensor, held.stack, piece)
                yield _Place(piece, tensor.dtype, block)


def piece_rows(tensor: torch.Tensor, stack: tuple[int, int, int] | None, piece: StripPiece) -> torch.Tensor:
    """The rows and columns of a tensor that a piece describes."""
    return stored_matrix(tensor, stack, piece.expert)[slice(*piece.place)]


@dataclasses.dataclass(frozen=True)
class StoredChunkPart:
    """One matrix of a chunk: of one layer, and of one expert.

    Attributes:
        start: offset of the chunk in the stored tensor; `at`: offset of this matrix.
        index: index of the matrix in the chunk.
        size, wanted: shape of the stored matrix, and the shape that it should have (None if the model has no such one).
    """

    key: str
    start: tuple[int, ...]
    at: tuple[int, ...]
    index: tuple[int, ...]
    file: str
    dtype: torch.dtype
    size: tuple[int, ...]
    wanted: tuple[int, ...] | None
    pieces: list[StripPiece]

    @property
    def label(self) -> str:
        return f"{self.key}/{'.'.join(map(str, self.at))}"


class StoredChunks:
    """A torch_dist folder: its chunks, where torch's own metadata says they are, loaded by torch one at a time."""

    def __init__(self, folder: Path, contents: Contents, sizes: ShardSizes) -> None:
        self.folder, self.contents, self.sizes = folder, contents, sizes
        said = dist_metadata(folder / METADATA)
        self.said = said.state_dict_metadata
        self.where = {(i.fqn, tuple(i.offset or ())): info for i, info in said.storage_data.items()}
        self.load = functools.lru_cache(maxsize=2)(self._load)  # a chunk of q, k and v is read a head at a time
        self.layer = functools.lru_cache(maxsize=4)(self._layer)
        outer = published.outer_matrices(contents, sizes.padded_vocab, first=True, last=True, copies=False)
        self.outer = {matrix.name: matrix for matrix in outer}

    def _load(self, key: str, start: tuple[int, ...]) -> torch.Tensor:
        place = self.where[key, start]
        path = self.folder / place.relative_path
        try:
            with open(path, "rb") as file:
                file.seek(place.offset)
                data = io.BytesIO(file.read(place.length))
            return torch.load(data, map_location="cpu", weights_only=True)
        except Exception as error:
            raise failed(path, error) from None

    def _layer(self, layer: int) -> dict[str, WholeMatrix]:
        experts = range(self.contents.arch.num_experts)
        return {m.name: m for m in published.layer_matrices(self.contents, layer, experts, stacked=False)}

    def matrix(self, key: str, start: tuple[int, ...]) -> tuple[WholeMatrix, int] | None:
        """The tensor to which a chunk belongs, and the number of leading indices (layer, expert) of the stored one."""
        if not key.startswith("decoder.layers."):
            return (self.outer[key], 0) if key in self.outer else None
        rest, lead = key.removeprefix("decoder.layers."), list(start)
        first, _, after = rest.partition(".")
        if first.isdecimal():  # layers under keys of their own
            rest, place = after, int(first)
        else:
            place = lead.pop(0)
        layer = self.sizes.model_layer(place)
        if layer is None or layer >= self.contents.arch.num_hidden_layers:
            return None
        if rest.startswith("mlp.experts.experts."):
            rest = f"mlp.experts.local_experts.{lead.pop(0)}.{rest.removeprefix('mlp.experts.experts.')}"
        matrix = self.layer(layer).get(NORMS.get(rest, rest))
        return None if matrix is None else (matrix, len(start) - len(lead))

    def chunks(self) -> Iterator[StoredChunkPart]:
        """Every matrix of every chunk of a weight."""
        for key, tensor in self.said.items():
            if key.startswith(_MODEL) and hasattr(tensor, "chunks") and not key.endswith("_extra_state"):
                for chunk in tensor.chunks:
                    yield from self._parts(key, tensor, tuple(chunk.offsets), tuple(chunk.sizes))

    def _parts(
        self, key: str, tensor: Any, start: tuple[int, ...], shape: tuple[int, ...]
    ) -> Iterator[StoredChunkPart]:
        info, dtype, found = self.where[key, start], tensor.properties.dtype, self.matrix(key, start)
        lead = found[1] if found else 0
        for index in itertools.product(*map(range, shape[:lead])):
            at = (*(first + i for first, i in zip(start, index, strict=False)), *start[lead:])
            matrix = found and self.matrix(key, at)
            wanted, pieces = None, list[StripPiece]()
            if matrix:
                whole, (row, *column), (rows, *columns) = matrix[0], start[lead:], shape[lead:]
                if whole.is_turned:
                    (column, row), (columns, rows) = ([row], column[0]), ([rows], columns[0])
                wanted = (whole.rows,) if whole.is_vector else (whole.rows, whole.columns)
                across = (column[0], column[0] + columns[0]) if column else (0, 1)
                pieces = shares.pieces(whole, [(row, row + rows)], across, 0 if whole.is_turned else None)
            size = tuple(tensor.size)[lead:]
            size = size[::-1] if matrix and matrix[0].is_turned else size
            place = info.relative_path
            yield StoredChunkPart(
                key, start, at, index, file=place, dtype=dtype, size=size, wanted=wanted, pieces=pieces
            )

    def places(self) -> Iterator[_Place]:
        """Every part of every chunk."""
        for part in self.chunks():
            for piece in part.pieces:
                yield _Place(piece, part.dtype, functools.partial(self.block, part, piece))

    def block(self, part: StoredChunkPart, piece: StripPiece) -> torch.Tensor:
        tensor = self.load(part.key, part.start)[part.index]
        stack = None if piece.expert is None else (1, *tensor.shape)
        return stored_matrix(tensor, stack, piece.expert)[slice(*piece.place)]


def megatron_tensors(reader: MegatronReader | DistReader) -> PieceTensors:
    """A Megatron checkpoint's tensors."""
    own = {name: getattr(torch, dtype.torch) for name, dtype in reader.own.items()}
    sizes = ShardSizes.of(reader.layout)
    if isinstance(reader, DistReader):
        places = StoredChunks(reader.folder, reader.contents, sizes).places()
    else:
        places = torch_places(reader.folder, reader.contents, sizes)
    return PieceTensors(places, own, str(reader.folder))
