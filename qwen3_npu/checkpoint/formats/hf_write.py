"""Write a Hugging Face directory: a model, or an adapter for PEFT."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import DType, full
from qwen3_npu.checkpoint.binary.safetensors_read import SafetensorsFile
from qwen3_npu.checkpoint.formats.base import Item, Output, Record, Stored, move_files
from qwen3_npu.checkpoint.formats.huggingface import (
    INDEX,
    SafetensorsWriter,
    plan_files,
    weight_map,
    write_index,
)
from qwen3_npu.checkpoint.formats.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, peft_config
from qwen3_npu.checkpoint.mapping.lora import Lora, peft_shapes
from qwen3_npu.checkpoint.mapping.slices import TensorSlice
from qwen3_npu.checkpoint.mapping.table import Shard, hf_shapes
from qwen3_npu.files import write_text
from qwen3_npu.model.arch import Qwen3Arch, to_hf_config

STAGE = ".conversion.partial"


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
                Shard(name, shape, shape, (TensorSlice(name, full(shape), full(shape)),), 0, None),
                self._dtype(name),
            )
            for name, shape in self.shapes.items()
        ]

    def write(self, path: Path, tensors: Iterator[np.ndarray]) -> dict[str, Any]:
        writer = SafetensorsWriter(path, {name: (self._dtype(name), shape) for name, shape in self.shapes.items()})
        for name, data in zip(self.shapes, tensors, strict=True):
            writer.write(name, data)
        writer.close()
        return {}

    def stored(self, path: Path) -> dict[str, Stored]:
        file = SafetensorsFile(path)

        def tensor(name: str) -> Stored:
            shape = file.shape(name)
            return Stored(file.dtype(name), shape, lambda: file.read(name, full(shape)))

        return {name: tensor(name) for name in file.header}


class HfOutput(Output):
    """A Hugging Face model directory; config.json comes last."""

    def __init__(
        self,
        root: Path,
        arch: Qwen3Arch,
        config: dict | None,
        dtype: DType,
        files: Mapping[str, list[str]],
        *,
        kept: Mapping[str, DType] | None = None,
    ) -> None:
        """
        Args:
            config: a config.json that the model came from; what Qwen3Arch does not say is kept.
            files: file name -> names of its tensors.
            kept: name -> dtype of the tensors that have another than `dtype`.
        """
        self.kept = dict(kept or {})
        self.root = self.folder = root
        self.stage = root / STAGE
        self.arch, self.config, self.dtype, self.files = arch, config, dtype, files
        shapes = hf_shapes(arch)
        self.total = sum(tensor_bytes(shapes, dtype, self.kept).values())
        self.jobs = [
            WeightFile(name, {n: shapes[n] for n in names}, dtype, {n: kept[n] for n in names if kept and n in kept})
            for name, names in files.items()
        ]

    def facts(self) -> dict[str, Any]:
        kept = {"kept": {name: dtype.torch for name, dtype in self.kept.items()}} if self.kept else {}
        return {"format": "hf", "dtype": self.dtype.torch, **kept, "files": list(self.files)}

    def existing(self) -> str | None:
        return f"{self.folder} already holds weights" if self._old() else None

    def _old(self) -> list[Path]:
        return [*self.folder.glob("*.safetensors"), *self.folder.glob(INDEX)]

    def publish(self, records: Mapping[str, Record]) -> None:
        write_index(self.stage, self.files, self.total)
        (self.folder / "config.json").unlink(missing_ok=True)  # without it, half-moved weights are no model
        move_files(self.stage, self.folder, self._old())

    def commit(self) -> None:
        text = json.dumps(to_hf_config(self.arch, self.config, self.dtype.torch), indent=2, ensure_ascii=False)
        write_text(self.folder / "config.json", text + "\n")

    def unexpected_files(self) -> list[str]:
        made = {job.name for job in self.jobs}
        found = {path.name for path in self.folder.glob("*.safetensors")} | set(weight_map(self.folder).values())
        return sorted(found - made)


def tensor_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: DType, kept: Mapping[str, DType]) -> dict[str, int]:
    """Name -> size in bytes; `kept` are those that have another dtype."""
    return {name: math.prod(shape) * kept.get(name, dtype).itemsize for name, shape in shapes.items()}


def plan_hf_files(
    arch: Qwen3Arch, dtype: DType, max_bytes: int, kept: Mapping[str, DType] | None = None
) -> dict[str, list[str]]:
    """File name -> names of its tensors; `kept` are those that have another dtype."""
    return plan_files(tensor_bytes(hf_shapes(arch), dtype, kept or {}), max_bytes)


class PeftOutput(Output):
    """An adapter directory that `peft` loads; adapter_config.json comes last."""

    def __init__(
        self,
        root: Path,
        arch: Qwen3Arch,
        lora: Lora,
        dtype: DType,
        base: str | None,
        *,
        kept: Mapping[str, DType] | None = None,
    ) -> None:
        """
        Args:
            base: folder of the base model, if it is known; `peft` can load that by itself then.
        """
        self.root = self.folder = root
        self.stage = root / STAGE
        self.config, self.dtype = peft_config(lora, base), dtype
        self.jobs = [WeightFile(ADAPTER_WEIGHTS, peft_shapes(arch, lora), dtype, dict(kept or {}))]

    def facts(self) -> dict[str, Any]:
        return {"format": "peft", "dtype": self.dtype.torch, "config": self.config}

    def existing(self) -> str | None:
        names = [name for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG) if (self.folder / name).exists()]
        return f"{self.folder} already holds {' and '.join(names)}" if names else None

    def publish(self, records: Mapping[str, Record]) -> None:
        (self.folder / ADAPTER_CONFIG).unlink(missing_ok=True)
        move_files(self.stage, self.folder, [p for p in [self.folder / ADAPTER_WEIGHTS] if p.exists()])

    def commit(self) -> None:
        write_text(self.folder / ADAPTER_CONFIG, json.dumps(self.config, indent=2) + "\n")

    def unexpected_files(self) -> list[str]:
        return []


def write_config(arch: Qwen3Arch, carry: dict | None, folder: Path, dtype: DType) -> None:
    """The config.json of a model whose weights have this dtype."""
    text = json.dumps(to_hf_config(arch, carry, dtype.torch), indent=2, ensure_ascii=False)
    write_text(folder / "config.json", text + "\n")
