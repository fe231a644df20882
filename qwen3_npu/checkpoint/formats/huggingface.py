"""Hugging Face model directories: safetensors read by regions and written as they come. No torch.

Format: https://github.com/huggingface/safetensors (8 bytes header length, JSON header, raw little-endian tensors).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import BY_SAFETENSORS, DType, Region, read_region
from qwen3_npu.checkpoint.mapping.lora import Contents
from qwen3_npu.checkpoint.mapping.source import check_tensors, listed
from qwen3_npu.checkpoint.mapping.table import hf_shapes
from qwen3_npu.errors import UsageError
from qwen3_npu.files import flush, replacing, write_text
from qwen3_npu.model.arch import Qwen3Arch, from_hf_config, read_hf_config

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# What from_pretrained needs beside the weights; carried along unchanged.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
CARRIED_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)


def is_hf_weights(folder: str | Path) -> bool:
    """Whether a directory holds a Hugging Face model's weights."""
    folder = Path(folder)
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


class SafetensorsFile:
    """One open .safetensors file: names, shapes, dtypes; regions are read on demand."""

    def __init__(self, path: Path) -> None:
        """Raises: UsageError: missing, not safetensors, or truncated."""
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UsageError(f"{path} cannot be opened: {error.strerror}") from None
        size = os.fstat(self.fd).st_size
        length = int.from_bytes(os.pread(self.fd, 8, 0), "little")
        if size < 8 or 8 + length > size:
            raise UsageError(f"{path} is not a whole safetensors file ({size} bytes); download or copy it again")
        try:
            self.header: dict[str, Any] = json.loads(os.pread(self.fd, length, 8))
        except ValueError:
            raise UsageError(f"{path} has no readable safetensors header; download or copy it again") from None
        self.header.pop("__metadata__", None)
        self.start = 8 + length
        end = self.start + max((e["data_offsets"][1] for e in self.header.values()), default=0)
        if end > size:
            raise UsageError(f"{path} is truncated: {end} bytes expected, {size} there; download or copy it again")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.header[name]["shape"])

    def dtype(self, name: str) -> DType:
        code = self.header[name]["dtype"]
        if code not in BY_SAFETENSORS:
            raise UsageError(f"{self.path}: {name} has dtype {code}; supported: {', '.join(BY_SAFETENSORS)}")
        return BY_SAFETENSORS[code]

    def read(self, name: str, region: Region) -> np.ndarray:
        offset = self.start + self.header[name]["data_offsets"][0]
        return read_region(self.fd, offset, self.shape(name), self.dtype(name), region, str(self.path))

    def close(self) -> None:
        os.close(self.fd)


class HfReader:
    """The tensors of a Hugging Face Qwen3 directory (one side of conversions; see `source.py`).

    Attributes:
        contents: a model's weights.
    """

    format = "hf"

    def __init__(self, folder: str | Path, shapes: Mapping[str, tuple[int, ...]], arch: Qwen3Arch) -> None:
        """Open all files and check them against the tensors that the architecture has.

        Raises:
            UsageError: a file is missing or truncated, or tensors are missing, extra or of another shape.
        """
        self.folder, self.arch, self.contents = Path(folder), arch, Contents(arch)
        self.files = [SafetensorsFile(path) for path in _weight_files(self.folder)]
        self.where = {name: file for file in self.files for name in file.header}
        if arch.tie_word_embeddings:
            # Published tied models store lm_head.weight all the same; it is the embedding.
            self.where.pop("lm_head.weight", None)
        found = {name: file.shape(name) for name, file in self.where.items()}
        check_tensors(found, shapes, str(self.folder), "this config.json")
        for name in shapes:
            self.dtype(name)  # an error now rather than after hours

    def dtype(self, name: str) -> DType:
        return self.where[name].dtype(name)

    def read(self, name: str, region: Region) -> np.ndarray:
        """A part of one tensor, in its own dtype (bfloat16 as uint16)."""
        return self.where[name].read(name, region)

    def check(self) -> None:
        """Nothing is left to check: opening did."""

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __str__(self) -> str:
        return "Hugging Face"


def open_hf(folder: str | Path) -> HfReader:
    """A Hugging Face directory with its own config.json as the architecture."""
    arch = from_hf_config(read_hf_config(folder), str(Path(folder) / "config.json"))
    return HfReader(folder, hf_shapes(arch), arch)


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, as a directory's index says; empty if it has no index.

    Raises:
        UsageError: the index cannot be read.
    """
    index = folder / INDEX
    if not index.is_file():
        return {}
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(Path(file).name) for name, file in names.items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UsageError(f"{index} is not a safetensors index; download it again") from None


def _weight_files(folder: Path) -> list[Path]:
    if names := sorted(set(weight_map(folder).values())):
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            raise UsageError(f"{folder}: {len(missing)} of {len(names)} weight files missing: {listed(missing)}")
        return [folder / n for n in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        other = "; it has pytorch_model*.bin: save it as safetensors" if list(folder.glob("*.bin")) else ""
        raise UsageError(f"{folder} holds no .safetensors file{other}")
    return files


def carry_files(source: Path, target: Path, names: Iterable[str] = CARRIED_FILES) -> list[str]:
    """Copy configuration and tokenizer files that exist; their names."""
    copied = [name for name in names if (source / name).is_file()]
    target.mkdir(parents=True, exist_ok=True)
    for name in copied:
        if (source / name).resolve() != (target / name).resolve():
            # Whole at any moment: the folder may be in use.
            with open(source / name, "rb") as old, replacing(target / name, binary=True) as new:
                shutil.copyfileobj(old, new)
    return copied


class SafetensorsWriter:
    """Writes one .safetensors file, tensor by tensor, in the announced order."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[DType, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in tensors.items():
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            header[name] = {"dtype": dtype.safetensors, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
        self.expected = list(tensors)
        self.file = open(path, "wb", buffering=0)
        self.file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, array: np.ndarray) -> None:
        if name != self.expected.pop(0):
            raise AssertionError(f"{name} written out of order")
        view = memoryview(np.ascontiguousarray(array)).cast("B")
        while view:
            view = view[self.file.write(view) :]

    def close(self) -> None:
        """Flush to disk. A file closed before its last tensor is an error of ours."""
        if self.expected:
            raise AssertionError(f"{len(self.expected)} tensors were not written")
        flush(self.file)
        self.file.close()


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


def write_index(folder: Path, files: Mapping[str, list[str]], total_bytes: int) -> None:
    """`model.safetensors.index.json`, if there is more than one file."""
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        text = json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=2)
        write_text(folder / INDEX, text + "\n")
