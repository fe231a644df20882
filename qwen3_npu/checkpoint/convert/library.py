"""Readers for --verify that share nothing with those of conversions: the safetensors library's and torch's own.

What tensors there are and what they should hold is said by the weight table; their bytes come from here.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import pickle
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import DType, Region, as_index, sizes
from qwen3_npu.checkpoint.binary.fp8 import SCALE
from qwen3_npu.checkpoint.binary.pickles import TensorRef
from qwen3_npu.checkpoint.binary.safetensors_read import SafetensorsFile
from qwen3_npu.checkpoint.formats.adapters import MergedSource, SharedA
from qwen3_npu.checkpoint.formats.dist_keys import FUSED_NORMS
from qwen3_npu.checkpoint.formats.dist_metadata import StoredChunk
from qwen3_npu.checkpoint.formats.dist_read import DistReader
from qwen3_npu.checkpoint.formats.folders import METADATA
from qwen3_npu.checkpoint.formats.huggingface import HfReader
from qwen3_npu.checkpoint.formats.open import Opened, Sources
from qwen3_npu.checkpoint.formats.peft import PeftReader
from qwen3_npu.checkpoint.formats.torch_read import MegatronReader
from qwen3_npu.checkpoint.mapping.source import SliceLocation, Source
from qwen3_npu.errors import UsageError, printable


def _bits(tensor: Any) -> np.ndarray:
    """A torch tensor as numpy carries it: bfloat16 as uint16."""
    import torch

    tensor = tensor.contiguous()
    return tensor.view(torch.int16).numpy().view("<u2") if tensor.dtype is torch.bfloat16 else tensor.numpy()


def _failed(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{path} cannot be read by its own library: {printable(str(error))[:200]}")


class HfLibrary:
    """A Hugging Face directory's tensors, read by the safetensors library."""

    def __init__(self, reader: HfReader) -> None:
        from safetensors import safe_open

        self.reader, self.arch, self.contents = reader, reader.arch, reader.contents
        self.files: dict[Path, Any] = {file.path: safe_open(file.path, framework="pt") for file in reader.files}

    def dtype(self, name: str) -> DType:
        return self.reader.dtype(name)

    def read(self, name: str, region: Region) -> np.ndarray:
        tensor = self.files[self.reader.where[name].path].get_slice(name)[as_index(region)]
        scaled = self.reader.scaled.get(name)
        if scaled is not None:
            import torch

            scales = self.files[scaled.scales.path].get_tensor(name + SCALE).float()
            for axis, ((start, stop), size) in enumerate(zip(region, scaled.block, strict=True)):
                scales = scales.index_select(axis, torch.arange(start, stop) // size)
            tensor = (tensor.float() * scales).to(getattr(torch, scaled.dtype.torch))
        return _bits(tensor)

    def close(self) -> None:
        self.files.clear()
        self.reader.close()


class MegatronLibrary:
    """A torch checkpoint's tensors, read by torch; which tensor holds what, the reader's table says."""

    def __init__(self, reader: MegatronReader) -> None:
        self.reader, self.arch, self.contents = reader, reader.arch, reader.contents
        self.loaded = functools.cache(torch_tensors)
        reader.read_stored = self.read_stored  # type: ignore[method-assign]

    def read_stored(self, holder: SliceLocation, tensor: TensorRef, region: Region) -> np.ndarray:
        path = self.reader.open(holder.where).path
        key = "model" if self.reader.layout.virtual == 1 else f"model{holder.shard.chunk}"
        found = self.loaded(path)[f"{key}.{holder.shard.name}"]
        return _bits(found.reshape(holder.shard.view)[as_index(region)])

    def dtype(self, name: str) -> DType:
        return self.reader.dtype(name)

    def read(self, name: str, region: Region) -> np.ndarray:
        return self.reader.read(name, region)

    def close(self) -> None:
        self.reader.close()


class SafetensorsLibrary:
    """What a reader asks of a .safetensors file, answered by the safetensors library."""

    def __init__(self, file: SafetensorsFile) -> None:
        from safetensors import safe_open

        self.path, self.header, self.dtype, self.shape = file.path, file.header, file.dtype, file.shape
        self.close = file.close
        self.opened: Any = safe_open(file.path, framework="pt")

    def read(self, name: str, region: Region) -> np.ndarray:
        return _bits(self.opened.get_slice(name)[as_index(region)])


def _peft_library(reader: PeftReader) -> PeftReader:
    reader.file = SafetensorsLibrary(reader.file)  # type: ignore[assignment]
    return reader


class DistLibrary:
    """The chunks of a torch_dist folder where torch's own metadata says they are, loaded by torch one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with open(folder / METADATA, "rb") as file:
            try:
                said = _Metadata(file).load()
                self.places = {(i.fqn, tuple(i.offset or ())): info for i, info in said.storage_data.items()}
            except Exception as error:
                raise _failed(folder / METADATA, error) from None
        self.chunk = functools.lru_cache(maxsize=2)(self._chunk)  # a chunk of q, k and v is read a head at a time

    def _chunk(self, key: str, start: tuple[int, ...]) -> Any:
        import torch

        place = self.places[key, start]
        path = self.folder / place.relative_path
        with open(path, "rb") as file:
            file.seek(place.offset)
            try:
                return torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
            except Exception as error:
                raise _failed(path, error) from None


def _dist_library(reader: DistReader) -> DistReader:
    library = DistLibrary(reader.folder)

    def read_chunk(key: str, chunk: StoredChunk, region: Region) -> np.ndarray:
        tensor = library.chunk(key, tuple(start for start, _ in chunk.region))
        return _bits(tensor.reshape(sizes(chunk.region))[as_index(region)])

    reader._read_chunk = read_chunk  # type: ignore[method-assign]
    return reader


class _Metadata(pickle.Unpickler):
    """Builds what torch.distributed.checkpoint describes tensors with; no other name is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        ours = module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        if (ours and "." not in name) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if (module, name) in (
            ("torch", "Size"),
            ("collections", "OrderedDict"),
            ("torch.serialization", "_get_layout"),
        ):
            return super().find_class(module, name)
        return _Ignored


class _Ignored:
    """Stands for whatever holds no tensors."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...


class _Tensors(pickle.Unpickler):
    """Builds tensors and the dicts that hold them; no other name is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return getattr(torch._utils, name)
        if module == "collections" and name in ("OrderedDict", "defaultdict"):
            return getattr(collections, name)
        return dict if name == "dict" else _Ignored


def torch_tensors(path: Path) -> dict[str, Any]:
    """Every tensor of a rank's file, mapped into memory by torch: `model.NAME`, under the local names."""
    import torch

    # The file was opened by the reader before, which refuses all that is not plain data.
    pickles = types.SimpleNamespace(Unpickler=_Tensors, load=pickle.load, __name__="tensors")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=pickles)
    except Exception as error:
        raise _failed(path, error) from None
    found = {}
    for key, model in content.items():
        if isinstance(key, str) and key.startswith("model") and isinstance(model, dict):
            for name, tensor in model.items():
                for ours, theirs in FUSED_NORMS.items():
                    name = name.removesuffix(theirs) + ours if name.endswith(theirs) else name
                found[f"{key}.{name}"] = tensor
    return found


@dataclasses.dataclass(frozen=True)
class LibrarySources:
    """Opens what a conversion reads, with libraries for its bytes."""

    sources: Sources

    def __call__(self) -> Source:
        return _with_library(self.sources())


def _with_library(source: Opened) -> Source:
    if isinstance(source, HfReader):
        return HfLibrary(source)
    if isinstance(source, MegatronReader):
        return MegatronLibrary(source)
    if isinstance(source, PeftReader):
        return _peft_library(source)
    if isinstance(source, DistReader):
        return _dist_library(source)
    if isinstance(source, SharedA):
        _peft_library(source.adapter)
        return source
    base: Any = source.base
    adapter: Any = source.adapter
    opened = _with_library(base)
    return MergedSource(opened, opened if adapter is base else _with_library(adapter), source.lora)


def output_reader(path: Path) -> Callable[[str], np.ndarray]:
    """Reads a tensor of a finished file by the name that its job gives it."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        try:
            file: Any = safe_open(path, framework="pt")
        except Exception as error:
            raise _failed(path, error) from None
        return lambda name: _bits(file.get_tensor(name))
    if path.suffix == ".pt":
        tensors = torch_tensors(path)
        return lambda name: _bits(tensors[name])
    library = DistLibrary(path.parent)

    def chunk(label: str) -> np.ndarray:
        key, _, start = label.rpartition("/")
        return _bits(library.chunk(key, tuple(map(int, start.split(".")))))

    return chunk
