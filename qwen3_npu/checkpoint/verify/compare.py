"""Compare a file of an output with the source, tensor by tensor and bit for bit.

`published.py` says what every tensor should hold, and the library of each format reads it from the source
(`tensors.py`). Copies on several ranks and padded rows are compared too. Only the names of the files are taken from the
conversion. A merged weight must equal base + scale * B @ A, computed in float64 and rounded, within the error of
float32 sums.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from qwen3_npu.checkpoint.folders import Count
from qwen3_npu.checkpoint.mapping.source import Contents, FileJob
from qwen3_npu.checkpoint.verify.adapters import MergedTensors
from qwen3_npu.checkpoint.verify.libraries import failed, torch_tensors
from qwen3_npu.checkpoint.verify.published import PADDING, is_turned, published_shapes
from qwen3_npu.checkpoint.verify.shares import ShardSizes, StripPiece, rank_tensors
from qwen3_npu.checkpoint.verify.tensors import PieceTensors, StoredChunks, VerifySource, piece_rows, torch_places
from qwen3_npu.errors import UsageError, printable

_BLOCK = 1 << 22  # numbers compared at a time


class WrittenTensor(NamedTuple):
    """A tensor of an output file.

    Attributes:
        wanted: the shape that it should have; None if it is no tensor of the model.
        rows: (piece, first row, last row) -> these rows as they are stored.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    wanted: tuple[int, ...] | None
    pieces: Sequence[StripPiece]
    rows: Callable[[StripPiece, int, int], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class VerifiedOutput:
    """The output that a folder should hold.

    Attributes:
        sizes: of a Megatron layout; None: Hugging Face and PEFT files.
        asked: the dtype of every tensor, if --params-dtype gives one.
        keeps: without `asked`: whether each tensor must have the dtype that holds its source exactly. False for an
            output of an earlier conversion, whose --params-dtype is unknown.
    """

    folder: Path
    contents: Contents
    sizes: ShardSizes | None
    asked: torch.dtype | None = None
    keeps: bool = False

    def tensors(self, name: str) -> tuple[Iterator[WrittenTensor], set[str]]:
        """The tensors in a file, and the names of missing ones. Raises: UsageError: it cannot be read."""
        path = self.folder / name
        if path.suffix == ".safetensors":
            return self._safetensors(path), set()
        if path.suffix != ".pt":
            return self._chunks(path), set()
        assert self.sizes is not None
        there, should = (
            torch_tensors(path),
            rank_tensors(self.contents, self.sizes, self.sizes.ranks()[path.parent.name]),
        )
        return _torch(there, should), should.keys() - there.keys()

    def _safetensors(self, path: Path) -> Iterator[WrittenTensor]:
        try:
            file: Any = safe_open(path, framework="pt")
        except Exception as error:
            raise failed(path, error) from None
        shapes = published_shapes(self.contents)
        for name in list(file.keys()):
            stored = file.get_slice(name)
            shape = tuple(stored.get_shape())
            high, wide = shape[::-1] if is_turned(name) else (shape[0], math.prod(shape[1:]))
            piece = StripPiece(name, (0, high), (0, wide), (0, high))
            rows = functools.partial(_slice_rows, stored)
            yield WrittenTensor(name, stored[:0].dtype, shape, shapes.get(name), pieces=[piece], rows=rows)

    def _chunks(self, path: Path) -> Iterator[WrittenTensor]:
        stored = self.chunks()
        for part in stored.chunks():
            if part.file == path.name:
                rows = _matrix_rows(functools.partial(stored.block, part))
                yield WrittenTensor(part.label, part.dtype, part.size, part.wanted, pieces=part.pieces, rows=rows)

    def chunks(self) -> StoredChunks:
        """The chunks of a torch_dist folder."""
        assert self.sizes is not None
        return StoredChunks(self.folder, self.contents, self.sizes)

    def pieces(self) -> Iterator[StripPiece]:
        """The pieces of Hugging Face tensors that its files hold."""
        if self.sizes is None:
            for path in sorted(self.folder.glob("*.safetensors")):
                yield from (piece for tensor in self._safetensors(path) for piece in tensor.pieces)
        elif self.is_torch:
            ranks = self.sizes.ranks().values()
            held = (h for rank in ranks for h in rank_tensors(self.contents, self.sizes, rank).values())
            yield from (piece for tensor in held for piece in tensor.pieces if not piece.copy)
        else:
            yield from (piece for part in self.chunks().chunks() for piece in part.pieces if not piece.copy)

    @property
    def is_torch(self) -> bool:
        """Whether it has the torch format."""
        return any(self.folder.glob("mp_rank_*"))

    def wanted_dtype(self, tensor: WrittenTensor, source: VerifySource) -> torch.dtype:
        """The dtype that a tensor should have; its present one if that is allowed."""
        if self.asked is not None:
            return self.asked
        there = set[torch.dtype]().union(*(source.dtypes(piece.hf) for piece in tensor.pieces))
        if not self.keeps or not there:
            return tensor.dtype
        exact = there.pop() if len(there) == 1 else torch.float32
        # torch_dist has one dtype for the tensors of all layers.
        is_wider = self.sizes is not None and not self.is_torch and tensor.dtype == torch.float32
        return tensor.dtype if is_wider else exact

    def itself(self) -> PieceTensors:
        """The output as a source, to compare copies with each other."""
        assert self.sizes is not None
        places = torch_places(self.folder, self.contents, self.sizes) if self.is_torch else self.chunks().places()
        return PieceTensors(places, {}, str(self.folder))


def _torch(there: Mapping[str, torch.Tensor], should: Mapping[str, Any]) -> Iterator[WrittenTensor]:
    for name, tensor in there.items():
        held = should.get(name)
        rows = _matrix_rows(functools.partial(piece_rows, tensor, held.stack if held else None))
        wanted, pieces = (held.shape, held.pieces) if held else (None, ())
        yield WrittenTensor(name, tensor.dtype, tuple(tensor.shape), wanted, pieces=pieces, rows=rows)


def _matrix_rows(block: Callable[[StripPiece], torch.Tensor]) -> Callable[[StripPiece, int, int], torch.Tensor]:
    return lambda piece, start, stop: block(piece)[start:stop]


def _slice_rows(stored: Any, piece: StripPiece, start: int, stop: int) -> torch.Tensor:
    if is_turned(piece.hf):
        return stored[:, start:stop].T
    return stored[start:stop].reshape(stop - start, -1)


@dataclasses.dataclass(frozen=True)
class CompareFile:
    """Compares one file."""

    output: VerifiedOutput

    def __call__(self, job: FileJob, source: VerifySource, count: Count) -> tuple[list[str], int, int, int]:
        """The differences, one line each; the numbers of compared tensors, of those with another dtype than their
        source, and of merged ones.
        """
        if not (self.output.folder / job.name).is_file():
            return [f"missing file: {job.name}"], 0, 0, 0
        promised = {item.name for item in job.items()} if job.name.endswith(".safetensors") else set()
        lines: list[str] = []
        numbers = [0, 0, 0]
        try:
            tensors, missing = self.output.tensors(job.name)
            lines += [f"missing: {job.name}: {name}" for name in sorted(missing)]
            for tensor in tensors:
                promised.discard(tensor.name)
                wrong = _difference(tensor, source, self.output.wanted_dtype(tensor, source))
                numbers[0] += 1
                numbers[1] += any(source.dtypes(piece.hf) != {tensor.dtype} for piece in tensor.pieces)
                numbers[2] += any(_added(source, piece) for piece in tensor.pieces)
                if wrong is not None:
                    lines.append(wrong.format(f"{job.name}: {printable(tensor.name)}"))
                count(sum(_numbers(piece) for piece in tensor.pieces) * tensor.dtype.itemsize)
            lines += [f"missing: {job.name}: {name}" for name in sorted(promised)]  # by an index
        except UsageError as error:
            lines.append(f"unreadable file: {job.name}: {error}")
        return lines, numbers[0], numbers[1], numbers[2]


def _numbers(piece: StripPiece) -> int:
    return (piece.place[1] - piece.place[0]) * (piece.columns[1] - piece.columns[0])


def _added(source: VerifySource, piece: StripPiece) -> bool:
    return isinstance(source, MergedTensors) and source.pair(piece.hf) is not None


def _difference(tensor: WrittenTensor, source: VerifySource, dtype: torch.dtype) -> str | None:
    """The difference of a tensor, with {} for its name; None if there is none."""
    if tensor.wanted is None:
        return "extra: {}"
    if (tensor.shape, tensor.dtype) != (tensor.wanted, dtype):
        found, wanted = (str(d).removeprefix("torch.") for d in (tensor.dtype, dtype))
        return f"differs: {{}} is {list(tensor.shape)} {found}, not {list(tensor.wanted)} {wanted}"
    return "differs: {}" if any(_is_other(piece, tensor, source) for piece in tensor.pieces) else None


def _is_other(piece: StripPiece, tensor: WrittenTensor, source: VerifySource) -> bool:
    height, width = piece.place[1] - piece.place[0], piece.columns[1] - piece.columns[0]
    step = max(1, _BLOCK // max(width, 1))
    for start in range(0, height, step):
        stop = min(start + step, height)
        rows = piece.rows if piece.copy == PADDING else (piece.rows[0] + start, piece.rows[0] + stop)
        expected, found = source.read(piece.hf, rows, piece.columns), tensor.rows(piece, start, stop)
        merged = source.merged(piece.hf, rows, piece.columns) if isinstance(source, MergedTensors) else None
        if not (_is_near(*merged, found) if merged else is_same(expected.expand(stop - start, width), found)):
            return True
    return False


def is_same(expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether two matrices hold the same bits, the first converted to the dtype of the second if it has another."""
    integers = {2: torch.int16, 4: torch.int32}[found.dtype.itemsize]
    converted = expected if expected.dtype == found.dtype else expected.float().to(found.dtype)
    same = converted.contiguous().view(integers) == found.contiguous().view(integers)
    if expected.dtype != found.dtype:
        same |= converted.isnan() & found.isnan()
    return bool(same.all())


def _is_near(exact: torch.Tensor, error: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether float32 sums within an error of exact ones can round to these values."""
    low, high = ((exact + sign * error).float().to(found.dtype) for sign in (-1, 1))
    inside = (low <= found) & (found <= high)
    return bool((inside | (exact.isnan() & found.isnan())).all())


def uncovered(output: VerifiedOutput) -> list[str]:
    """Weights that the output does not hold completely, one line each. (Of the torch format each file is checked.)"""
    there: dict[str, set[tuple[int, int, int, int]]] = {}
    for piece in output.pieces():
        there.setdefault(piece.hf, set()).add((*piece.rows, *piece.columns))
    lines = []
    for name, shape in published_shapes(output.contents).items():
        held = sum((bottom - top) * (right - left) for top, bottom, left, right in there.get(name, ()))
        if held != math.prod(shape):
            lines.append(f"missing: {name}" + (", a part of it" if held else ""))
    return lines
