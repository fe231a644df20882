"""The `.metadata` file of a torch_dist checkpoint: which tensors there are, and where their chunks lie. No torch.

It is a pickle of `torch.distributed.checkpoint.metadata.Metadata`: state_dict_metadata maps a key to its shape, dtype
and chunks, storage_data maps (key, offset of a chunk) to a file, a position in it and a length. What lies there is a
`torch.save` archive of that chunk. The pickle is read as `pickles.py` reads all pickles: nothing is imported.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3_npu.checkpoint.binary.dtypes import DType, Region
from qwen3_npu.checkpoint.binary.pickles import Unknown, read_pickle
from qwen3_npu.checkpoint.binary.torch_zip_write import TorchName, TorchPickler
from qwen3_npu.errors import UsageError
from qwen3_npu.files import Seal, SealedFile

_METADATA, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"


@dataclasses.dataclass(frozen=True)
class StoredChunk:
    """A part of a stored tensor, and where its archive lies.

    Attributes:
        region: the part.
        file: name in the checkpoint's folder.
        start, length: of the archive, in bytes.
    """

    region: Region
    file: str
    start: int
    length: int


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A whole tensor; dtype None: one that is no weight's."""

    dtype: DType | None
    size: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


def read_metadata(path: Path) -> tuple[dict[str, StoredTensor], dict[str, StoredChunk]]:
    """Every tensor of the checkpoint, and every object (its region is empty).

    Raises:
        UsageError: the file is missing or damaged, or holds something that is not plain data.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be opened: {error.strerror}; the checkpoint is not whole") from None
    content = _fields(read_pickle(data, path)[0], "state_dict_metadata", "planner_data", "storage_data")
    if not isinstance(content.get("storage_data"), dict) or not isinstance(content.get("state_dict_metadata"), dict):
        raise UsageError(f"{path} is not the metadata of a torch_dist checkpoint")
    chunks: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
    objects: dict[str, StoredChunk] = {}
    for index, info in content["storage_data"].items():
        where = _fields(index, "fqn", "offset", "index")
        if where.get("offset") is not None:
            chunks.setdefault(where["fqn"], []).append((tuple(where["offset"]), info))
        else:
            objects[where["fqn"]] = _chunk((), (), info, path)
    tensors = {}
    for key, entry in content["state_dict_metadata"].items():
        fields = _fields(entry, "properties", "size", "chunks")
        if "size" not in fields:
            continue  # an object, not a tensor
        sizes = {}
        for chunk in fields["chunks"]:
            place = _fields(chunk, "offsets", "sizes")
            sizes[tuple(place["offsets"])] = tuple(place["sizes"])
        dtype = _fields(fields["properties"], "dtype").get("dtype")
        stored = tuple(_chunk(offset, sizes.get(offset), info, path) for offset, info in chunks.get(key, []))
        tensors[key] = StoredTensor(dtype if isinstance(dtype, DType) else None, tuple(fields["size"]), stored)
    return tensors, objects


def _chunk(offset: tuple[int, ...], size: tuple[int, ...] | None, info: Any, path: Path) -> StoredChunk:
    fields = _fields(info, "relative_path", "offset", "length")
    file = str(fields.get("relative_path", ""))
    if size is None or Path(file).name != file:
        raise UsageError(f"{path} is damaged: a chunk at {offset} of file {file!r} has no place")
    region = tuple((start, start + n) for start, n in zip(offset, size, strict=True))
    return StoredChunk(region, file, fields["offset"], fields["length"])


def _fields(value: Any, *names: str) -> dict[str, Any]:
    """The fields of a dataclass in the pickle, given by its constructor's arguments or by its state."""
    if not isinstance(value, Unknown):
        return {}
    state = value.state
    if isinstance(state, tuple):  # a __getstate__ of its own: the fields in order
        return dict(zip(names, state, strict=False))
    return {**dict(zip(names, value.args, strict=False)), **(state or {})}


@functools.cache
def _name(module: str, name: str) -> TorchName:
    """One object per name, which the pickle then holds once."""
    return TorchName(module, name)


@dataclasses.dataclass(frozen=True)
class _Call:
    """Pickled as a call of a class inside torch, which unpickling makes."""

    module: str
    name: str
    arguments: tuple

    def __reduce__(self) -> tuple:
        return _name(self.module, self.name), self.arguments


def write_metadata(path: Path, tensors: Mapping[str, StoredTensor], objects: Mapping[str, StoredChunk]) -> Seal:
    """The reverse of `read_metadata`, readable by torch.distributed.checkpoint.

    Args:
        objects: keys that hold pickled objects; their regions are empty.
    """
    entries: dict[str, _Call] = {}
    storage: dict[_Call, _Call] = {}
    for key, tensor in tensors.items():
        places = []
        for number, chunk in enumerate(tensor.chunks):
            start, shape = tuple(a for a, _ in chunk.region), tuple(b - a for a, b in chunk.region)
            places.append(_Call(_METADATA, "ChunkStorageMetadata", (_size(start), _size(shape))))
            storage[_Call(_METADATA, "MetadataIndex", (key, start, number))] = _stored(chunk)
        properties = _Call(_METADATA, "TensorProperties", (tensor.dtype,))
        entries[key] = _Call(_METADATA, "TensorStorageMetadata", (properties, _size(tensor.size), places))
    for key, chunk in objects.items():
        entries[key] = _Call(_METADATA, "BytesStorageMetadata", ())
        storage[_Call(_METADATA, "MetadataIndex", (key,))] = _stored(chunk)
    pickled = io.BytesIO()
    TorchPickler(pickled).dump(_Call(_METADATA, "Metadata", (entries, None, storage)))
    file = SealedFile(path)
    file.write(pickled.getbuffer())
    return file.close()


def _size(sizes: tuple[int, ...]) -> _Call:
    return _Call("torch", "Size", (sizes,))


def _stored(chunk: StoredChunk) -> _Call:
    return _Call(_FILES, "_StorageInfo", (chunk.file, chunk.start, chunk.length))
