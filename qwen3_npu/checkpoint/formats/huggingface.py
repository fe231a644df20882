"""Hugging Face model directories: safetensors read by regions and written as they come. No torch.

Format: https://github.com/huggingface/safetensors (8 bytes header length, JSON header, raw little-endian tensors).
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import DType, Region, full, row_blocks, same_bits, to_float32
from qwen3_npu.checkpoint.binary.fp8 import SCALE, BlockScaled, block_sizes
from qwen3_npu.checkpoint.binary.safetensors import SafetensorsFile, SafetensorsWriter
from qwen3_npu.checkpoint.mapping.source import Contents, Item, Stored, check_tensors, listed
from qwen3_npu.checkpoint.mapping.table import EMBEDDING, Shard, TensorSlice, hf_shapes
from qwen3_npu.errors import UsageError, printable
from qwen3_npu.files import Seal, replacing, write_text
from qwen3_npu.model.arch import Qwen3Arch, from_hf_config, read_hf_config, to_hf_config
from qwen3_npu.once import shared_record
from qwen3_npu.schema import shown

LM_HEAD = "lm_head.weight"
# How tensors of other kinds of models end, what they are then, and what to take instead.
_OTHER_KINDS = (
    (".weight_scale", "quantized weights (FP8 or compressed-tensors)", "take the bfloat16 model"),
    (".g_idx", "GPTQ weights", "take the bfloat16 model"),
    (".qweight", "AWQ (or GPTQ) weights", "take the bfloat16 model"),
    (".absmax", "bitsandbytes weights", "take the bfloat16 model"),
    (".SCB", "bitsandbytes weights of 8 bits", "take the bfloat16 model"),
    (".weight_packed", "compressed-tensors weights", "take the bfloat16 model"),
    ("score.weight", "a classification model", "a reward model is read whose config.json says so (1 label)"),
    ("v_head.summary.weight", "a reward model with a value head", "only causal language models are supported"),
)
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
    "additional_chat_templates/*.jinja",
)
CARRIED_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)


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
        self.where: dict[str, SafetensorsFile] = {}
        for file in self.files:
            if twice := self.where.keys() & file.header.keys():
                where = self.where[min(twice)].path.name
                raise UsageError(f"{file.path}: {printable(min(twice))} is in {where} too; remove the file too many")
            self.where |= dict.fromkeys(file.header, file)
        _refuse_quantized(self.folder / "config.json")
        _refuse_other_kinds(sorted(self.where.keys() - shapes.keys()), self.folder)
        self.scaled = self._take_scales(shapes)
        # Published tied models store lm_head.weight all the same; `check` compares it with the embedding.
        self.head = self.where.pop(LM_HEAD, None) if arch.tie_word_embeddings else None
        found = {name: file.shape(name) for name, file in self.where.items()}
        check_tensors(found, shapes, str(self.folder), "this config.json")
        for name in shapes:
            self.dtype(name)  # an error now rather than after hours

    def _take_scales(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, BlockScaled]:
        """The FP8 weights; their scales are removed from the header. Raises: UsageError: they cannot be read."""
        scales = {name: self.where.pop(name) for name in sorted(self.where) if name.endswith(f".weight{SCALE}")}
        if not scales:
            return {}
        block = block_sizes(shared_record(self.folder / "config.json"))
        embedding = EMBEDDING.hf[0]
        if embedding not in self.where:
            raise UsageError(f"{self.folder}: tensors missing for this config.json: {embedding}")
        dtype = self.where[embedding].dtype(embedding)  # what is not quantized says what the model is computed in
        found = {}
        for scale, file in scales.items():
            name = scale.removesuffix(SCALE)
            if name not in self.where or name not in shapes:
                raise UsageError(f"{file.path}: {printable(scale)} is the scale of no weight of this config.json")
            found[name] = BlockScaled(name, self.where[name], file, block, dtype=dtype)
        return found

    def dtype(self, name: str) -> DType:
        return self.scaled[name].dtype if name in self.scaled else self.where[name].dtype(name)

    def read(self, name: str, region: Region) -> np.ndarray:
        """A part of one tensor, in its own dtype (bfloat16 as uint16); FP8 in that of the other weights."""
        return self.scaled[name].read(region) if name in self.scaled else self.where[name].read(name, region)

    def check(self) -> None:
        """Check that the stored output layer of a tied model equals the embedding; opening did not read them.

        Raises:
            UsageError: it is another matrix. transformers 5 does not tie such a model whatever its config.json says.
        """
        if self.head is not None and not _is_same(self.head, LM_HEAD, self.where[EMBEDDING.hf[0]], EMBEDDING.hf[0]):
            raise UsageError(
                f"{self.folder}: config.json has tie_word_embeddings true, but {LM_HEAD} is not {EMBEDDING.hf[0]}; "
                f"transformers 5 does not tie them either: set tie_word_embeddings to false"
            )

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __str__(self) -> str:
        return "Hugging Face" + (f", {len(self.scaled)} FP8 weights dequantized" if self.scaled else "")


def open_hf(folder: str | Path) -> HfReader:
    """A Hugging Face directory with its own config.json as the architecture."""
    arch = from_hf_config(read_hf_config(folder), str(Path(folder) / "config.json"))
    return HfReader(folder, hf_shapes(arch), arch)


def _refuse_quantized(config: Path) -> None:
    """Raises: UsageError: config.json says that the weights are quantized (AWQ, GPTQ ...). FP8 in blocks is read."""
    said = shared_record(config).fields.get("quantization_config") if config.is_file() else None
    method = said.get("quant_method") if isinstance(said, dict) else said
    if method not in (None, "fp8"):
        raise UsageError(
            f"{config}: quantization_config has quant_method {shown(method)}: such weights are not read; take the "
            f"bfloat16 model"
        )


def _refuse_other_kinds(names: Iterable[str], folder: Path) -> None:
    names = list(names)
    for ending, kind, remedy in _OTHER_KINDS:
        if found := next((name for name in names if name.endswith(ending)), None):
            raise UsageError(f"{folder} holds {kind} ({printable(found)}), which are not read; {remedy}")
    if "embed_tokens.weight" in names:
        raise UsageError(
            f"{folder} holds an embedding model (embed_tokens.weight without 'model.' before it, no output layer); "
            f"only causal language models are supported"
        )


def _is_same(file: SafetensorsFile, name: str, other: SafetensorsFile, other_name: str) -> bool:
    """Whether two tensors have the same values, read in blocks."""
    shape, dtype, other_dtype = file.shape(name), file.dtype(name), other.dtype(other_name)
    if shape != other.shape(other_name):
        return False
    for block in row_blocks(full(shape), dtype.itemsize):
        a, b = file.read(name, block), other.read(other_name, block)
        if dtype is not other_dtype:
            a, b = to_float32(a, dtype), to_float32(b, other_dtype)
        if not same_bits(a, b):
            return False
    return True


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, as a directory's index says; empty if it has no index.

    Raises:
        UsageError: the index cannot be read, or names files elsewhere.
    """
    index = folder / INDEX
    if not index.exists():
        return {}
    names = shared_record(index).record("weight_map")
    files = {name: names.text(name) for name in names.fields}
    for name, file in files.items():
        if Path(file).name != file:
            raise UsageError(f"{index}: {printable(name)} is in {shown(file)}; a file in {folder} is expected")
    return files


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
    """Copy configuration and tokenizer files that exist; their names.

    Args:
        names: names and patterns, relative to the folder.
    """
    copied = [p.relative_to(source).as_posix() for name in names for p in sorted(source.glob(name)) if p.is_file()]
    target.mkdir(parents=True, exist_ok=True)
    for name in copied:
        (target / name).parent.mkdir(exist_ok=True)
        if (source / name).resolve() != (target / name).resolve():
            # Complete at any moment: the folder may be in use.
            with open(source / name, "rb") as old, replacing(target / name, binary=True) as new:
                shutil.copyfileobj(old, new)
    return copied


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
