"""Write a Hugging Face directory from any source."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from qwen3_npu.checkpoint.hf_files import INDEX, SafetensorsWriter, plan_files, write_index
from qwen3_npu.checkpoint.jobs import Record, Written, remove_records, run_jobs
from qwen3_npu.checkpoint.source import Source
from qwen3_npu.checkpoint.tensors import DType, convert, full
from qwen3_npu.checkpoint.weights import hf_shapes
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch, to_hf_config

_STAGE = ".conversion.partial"


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """One .safetensors file: its name and the tensors in it."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    dtype: DType

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values()) * self.dtype.itemsize

    def write(self, source: Source, path: Path, written: Written) -> None:
        """Tensor by tensor; see `FileJob`."""
        writer = SafetensorsWriter(path, {name: (self.dtype, shape) for name, shape in self.shapes.items()})
        for name, shape in self.shapes.items():
            data = convert(source.read(name, full(shape)), source.dtype(name), self.dtype)
            writer.write(name, data)
            written(name, data)
        writer.close()


def write_hf_weights(
    open_source: Callable[[], Source],
    arch: Qwen3Arch,
    folder: Path,
    dtype: DType,
    max_bytes: int,
    *,
    workers: int = 1,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Record]:
    """Write the .safetensors files and their index into `folder`; config.json is left to the caller, to write last.

    Raises:
        UsageError: weights are there already (without `overwrite`), or see `run_jobs`.
    """
    stage = folder / _STAGE
    old = [*folder.glob("*.safetensors"), *folder.glob(INDEX)]
    if overwrite:
        shutil.rmtree(stage, ignore_errors=True)
    elif old:
        raise UsageError(f"{folder} already holds weights; give --overwrite to replace them, or another --save-dir")
    shapes = hf_shapes(arch)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    files = plan_files(sizes, max_bytes)
    jobs = [WeightFile(name, {n: shapes[n] for n in names}, dtype) for name, names in files.items()]
    records = run_jobs(jobs, open_source, stage, workers=workers, resume=resume, what="writing safetensors")
    remove_records(stage)
    write_index(stage, files, sum(sizes.values()))
    for path in old:
        path.unlink()
    for path in sorted(stage.iterdir()):  # the index sorts after the weights it names
        os.replace(path, folder / path.name)
    stage.rmdir()
    return records


def write_config(arch: Qwen3Arch, carry: dict | None, folder: Path, dtype: DType) -> None:
    """The config.json of a model whose weights have this dtype."""
    text = json.dumps(to_hf_config(arch, carry, dtype.torch), indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
