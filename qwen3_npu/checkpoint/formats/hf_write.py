"""Write safetensors files and what lies beside them in a Hugging Face directory."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import DType, full
from qwen3_npu.checkpoint.binary.safetensors import SafetensorsFile
from qwen3_npu.checkpoint.formats.base import Item, Stored
from qwen3_npu.checkpoint.formats.huggingface import INDEX, SINGLE
from qwen3_npu.checkpoint.mapping.table import Shard, TensorSlice, hf_shapes
from qwen3_npu.files import Seal, SealedFile, write_text
from qwen3_npu.model.arch import Qwen3Arch, to_hf_config


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """One .safetensors file; see `FileJob`."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    dtype: DType
    kept: Mapping[str, DType] = dataclasses.field(default_factory=dict)  # names of those with another dtype

    def _dtype(self, name: str) -> DType:
        return self.kept.get(name, self.dtype)

    def items(self) -> list[Item]:
        return [
            Item(
                name,
                Shard(name, shape, shape, (TensorSlice(name, full(shape), full(shape)),), chunk=0, layer=None),
                self._dtype(name),
            )
            for name, shape in self.shapes.items()
        ]

    def write(self, path: Path, tensors: Iterator[np.ndarray]) -> tuple[Seal, object]:
        writer = SafetensorsWriter(path, {name: (self._dtype(name), shape) for name, shape in self.shapes.items()})
        for name, data in zip(self.shapes, tensors, strict=True):
            writer.write(name, data)
        return writer.close(), None

    def stored(self, path: Path) -> dict[str, Stored]:
        file = SafetensorsFile(path)
        file.close()
        return {name: Stored(file.dtype(name), file.shape(name)) for name in file.header}


def tensor_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: DType, kept: Mapping[str, DType]) -> dict[str, int]:
    """Name -> size in bytes; `kept` are those that have another dtype."""
    return {name: math.prod(shape) * kept.get(name, dtype).itemsize for name, shape in shapes.items()}


def plan_hf_files(
    arch: Qwen3Arch, dtype: DType, max_bytes: int, kept: Mapping[str, DType] | None = None
) -> dict[str, list[str]]:
    """File name -> names of its tensors; `kept` are those that have another dtype."""
    return plan_files(tensor_bytes(hf_shapes(arch), dtype, kept or {}), max_bytes)


class SafetensorsWriter:
    """Writes one .safetensors file, tensor by tensor, in the announced order."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[DType, tuple[int, ...]]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in tensors.items():
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            header[name] = {"dtype": dtype.safetensors, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
        self.expected = list(tensors)
        self.file = SealedFile(path)
        self.file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, array: np.ndarray) -> None:
        if name != self.expected.pop(0):
            raise AssertionError(f"{name} written out of order")
        self.file.write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")

    def close(self) -> Seal:
        """Flush to disk. Closing before the last tensor is a programming error."""
        if self.expected:
            raise AssertionError(f"{len(self.expected)} tensors were not written")
        return self.file.close()


def plan_files(tensors: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """File name -> tensor names, filled in order up to `max_bytes` each (a larger tensor gets a file of its own).

    Args:
        tensors: name -> size in bytes, in the order to write.
    """
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in tensors.items():
        if groups[-1] and used + size > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def write_weight_index(folder: Path, files: Mapping[str, list[str]], total_bytes: int) -> None:
    """`model.safetensors.index.json`, if there is more than one file."""
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        text = json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=2)
        write_text(folder / INDEX, text + "\n")


def write_config(arch: Qwen3Arch, carry: dict | None, folder: Path, dtype: DType) -> None:
    """The config.json of a model whose weights have this dtype."""
    text = json.dumps(to_hf_config(arch, carry, dtype.torch), indent=2, ensure_ascii=False)
    write_text(folder / "config.json", text + "\n")
