"""LoRA adapters as sources: merged into the base model, or with one A per linear, as Megatron adapters have."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from qwen3_npu.args.lora import ALL_TARGETS
from qwen3_npu.checkpoint.binary.dtypes import (
    F32,
    DType,
    Region,
    convert_dtype,
    from_float32,
    full,
    intersect,
    relative,
    row_blocks,
    same_bits,
    sizes,
    to_float32,
    widest,
)
from qwen3_npu.checkpoint.formats.peft import PeftReader
from qwen3_npu.checkpoint.mapping.lora import (
    MAGNITUDE,
    PEFT_SCORE,
    Lora,
    initial,
    is_a,
    peft_module,
    peft_name,
    peft_shapes,
)
from qwen3_npu.checkpoint.mapping.source import Contents, Source, view_of
from qwen3_npu.checkpoint.mapping.table import SCORE


class MergedSource:
    """base + (alpha / r) * B @ A, computed in float32 and cast once, to the dtype that is written.

    Args:
        base: holds the model's weights.
        adapter: holds the adapter's tensors; may be the same source.
    """

    def __init__(self, base: Source, adapter: Source, lora: Lora) -> None:
        self.base, self.adapter, self.lora = base, adapter, lora
        # An adapter brings the head of a reward model, which its base need not have.
        self.arch = base.arch.as_reward() if adapter.arch.reward else base.arch
        self.contents = Contents(self.arch)
        self.adapted = peft_shapes(self.arch, lora)
        self.token_lengths: dict[str, np.ndarray] = {}

    def dtype(self, name: str) -> DType:
        return F32 if self.is_adapted(name) else self.unmerged_dtype(name)

    def unmerged_dtype(self, name: str) -> DType:
        """The dtype in which a weight is stored before the merge."""
        return self.adapter.dtype(PEFT_SCORE) if name == SCORE.hf[0] else self.base.dtype(name)

    def is_adapted(self, name: str) -> bool:
        return peft_name(name, "A") in self.adapted

    def read(self, name: str, region: Region) -> np.ndarray:
        if name == SCORE.hf[0]:
            return self.adapter.read(PEFT_SCORE, region)
        weight = self.base.read(name, region)
        if not self.is_adapted(name):
            return weight
        rows, columns = region
        rank = (0, self.lora.r)
        if is_turned(name):
            product = self.matrix(name, "A", (rank, rows)).T @ self.matrix(name, "B", (columns, rank)).T
            whole = to_float32(weight, self.base.dtype(name)) + np.float32(self.lora.scale) * product
            return whole * self.turned_factors(name, columns) if self.lora.is_dora else whole
        if self.lora.is_dora:
            whole = self.directions(name, rows)
            return (self.factors(name, rows, whole)[:, None] * whole)[:, slice(*columns)]
        b = self.matrix(name, "B", (rows, rank)) * np.float32(self.lora.scale)
        product = b @ self.matrix(name, "A", (rank, columns))
        return to_float32(weight, self.base.dtype(name)) + product

    def turned_factors(self, name: str, columns: tuple[int, int]) -> np.ndarray:
        """DoRA of an embedding: the factors of some columns. The norm of a column covers the whole vocabulary."""
        if name not in self.token_lengths:
            rank, (hidden,) = (0, self.lora.r), self.adapted[peft_name(name, MAGNITUDE)]
            vocabulary, total = self.adapted[peft_name(name, "A")][1], np.zeros(hidden, np.float64)
            b = self.matrix(name, "B", ((0, hidden), rank)).T * np.float32(self.lora.scale)
            for region in row_blocks(((0, vocabulary), (0, hidden)), 4):
                weight = to_float32(self.base.read(name, region), self.base.dtype(name))
                total += np.square(weight + self.matrix(name, "A", (rank, region[0])).T @ b, dtype=np.float64).sum(0)
            self.token_lengths[name] = np.sqrt(total).astype(np.float32)
        return self.matrix(name, MAGNITUDE, (columns,)) / self.token_lengths[name][slice(*columns)]

    def directions(self, name: str, rows: tuple[int, int]) -> np.ndarray:
        """Complete rows of W + scale * B @ A, float32."""
        rank, columns = (0, self.lora.r), (0, self.adapted[peft_name(name, "A")][1])
        weight = to_float32(self.base.read(name, (rows, columns)), self.base.dtype(name))
        b = self.matrix(name, "B", (rows, rank)) * np.float32(self.lora.scale)
        return weight + b @ self.matrix(name, "A", (rank, columns))

    def factors(self, name: str, rows: tuple[int, int], directions: np.ndarray) -> np.ndarray:
        """DoRA: the factor that scales each of these rows to its magnitude, [rows] float32."""
        return self.matrix(name, MAGNITUDE, (rows,)) / np.linalg.norm(directions, axis=1)

    def matrix(self, name: str, matrix: str, region: Region) -> np.ndarray:
        """A part of the A, B or magnitudes beside a Hugging Face weight, float32."""
        adapter = peft_name(name, matrix)
        return to_float32(self.adapter.read(adapter, region), self.adapter.dtype(adapter))

    def close(self) -> None:
        self.base.close()
        if self.adapter is not self.base:
            self.adapter.close()


def is_turned(name: str) -> bool:
    """Whether a weight is the transpose of its adapter's product B A: an embedding is."""
    return peft_name(name, "A").endswith("lora_embedding_A")


class PlainLora:
    """A PiSSA adapter as LoRA of twice the rank on the weights themselves: B A - B0 A0, as peft converts it.

    The first r rows of A and columns of B are the trained ones. The others are the initial ones, those of B negated.
    """

    def __init__(self, adapter: Source) -> None:
        lora = adapter.contents.lora
        assert lora is not None
        self.adapter, self.arch, self.r = adapter, adapter.arch, lora.r
        alpha = lora.alpha * (math.sqrt(2) if lora.is_stabilized else 2)
        self.lora = dataclasses.replace(lora, r=2 * lora.r, alpha=alpha, is_residual=False)
        self.contents = Contents(self.arch, base=False, lora=self.lora)

    def dtype(self, name: str) -> DType:
        return self.adapter.dtype(name)

    def read(self, name: str, region: Region) -> np.ndarray:
        if name == PEFT_SCORE or name.endswith(MAGNITUDE):
            return self.adapter.read(name, region)
        axis, dtype = 0 if is_a(name) else 1, self.dtype(name)
        out = np.zeros(sizes(region), dtype.carrier)
        for start, stored in ((0, name), (self.r, initial(name))):
            if stored != name and "lora_embedding_" in name:
                continue  # begins with an A of 0
            place = tuple((start, start + self.r) if i == axis else region[i] for i in range(2))
            common = intersect(region, place)
            if common is None:
                continue
            there = tuple((a - start, b - start) if i == axis else (a, b) for i, (a, b) in enumerate(common))
            data = self.adapter.read(stored, there)
            if start and axis:
                data = from_float32(-to_float32(data, dtype), dtype)
            view_of(out, common, region)[...] = data
        return out

    def close(self) -> None:
        self.adapter.close()


class SharedA:
    """A PEFT adapter whose projections of one linear have the same A.

    Adapters from Megatron have it already. For other adapters, the A's of q, k and v (of gate and up) are stacked, and
    each B is padded with zeros. Rank and alpha are multiplied by the number of projections, so B @ A and alpha / r do
    not change.
    """

    def __init__(self, adapter: PeftReader) -> None:
        self.adapter, self.arch = adapter, adapter.arch
        lora = adapter.contents.lora
        assert lora is not None
        self.r = lora.r
        # Projection -> its place among those of its linear that the adapter has.
        self.siblings = {
            projection: [name for name in ALL_TARGETS[target] if name in adapter.projections]
            for target in lora.targets
            for projection in ALL_TARGETS[target]
        }
        self.width = 1 if self._is_shared() else max(map(len, self.siblings.values()))
        alpha = lora.alpha * (math.sqrt(self.width) if lora.is_stabilized else self.width)
        self.lora = dataclasses.replace(lora, r=lora.r * self.width, alpha=alpha)
        self.contents = Contents(self.arch, base=False, lora=self.lora)

    def _sibling(self, name: str, projection: str) -> str:
        return peft_name(f"{peft_module(name).rpartition('.')[0]}.{projection}".strip("."), "A" if is_a(name) else "B")

    def _siblings(self, name: str) -> list[str]:
        return self.siblings[peft_module(name).split(".")[-1]]

    def _is_shared(self) -> bool:
        for name, shape in self.adapter.shapes.items():
            if not is_a(name):
                continue
            first = self._sibling(name, self._siblings(name)[0])
            if self.adapter.has(name) and first != name:
                whole = full(shape)
                if not same_bits(self.adapter.read(name, whole), self.adapter.read(first, whole)):
                    return False
        return True

    def dtype(self, name: str) -> DType:
        if name == PEFT_SCORE or name.endswith(MAGNITUDE):
            return self.adapter.dtype(name)
        siblings = self._siblings(name)
        return widest(self.adapter.dtype(self._sibling(name, sibling)) for sibling in siblings)

    def read(self, name: str, region: Region) -> np.ndarray:
        if name == PEFT_SCORE or name.endswith(MAGNITUDE):
            return self.adapter.read(name, region)
        axis = 0 if is_a(name) else 1  # the side of the rank
        projection = peft_module(name).split(".")[-1]
        siblings = self.siblings[projection]
        # Which projections' matrices it is made of, and their places along the rank.
        parts = list(enumerate(siblings[: self.width]))
        if axis == 1:
            parts = [(place % self.width, s) for place, s in enumerate(siblings) if s == projection]
        out = np.zeros(sizes(region), self.dtype(name).carrier)
        for place, sibling in parts:
            origin = [(0, 0), (0, 0)]
            origin[axis] = (place * self.r, (place + 1) * self.r)
            common = intersect(region, tuple(origin[i] if i == axis else region[i] for i in range(2)))
            if common is not None:
                other = self._sibling(name, sibling)
                data = self.adapter.read(other, relative(common, tuple(origin)))
                view_of(out, common, region)[...] = convert_dtype(data, self.adapter.dtype(other), self.dtype(name))
        return out

    def close(self) -> None:
        self.adapter.close()
