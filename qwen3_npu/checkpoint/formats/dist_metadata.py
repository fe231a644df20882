"""The `.metadata` file of a torch_dist checkpoint: which tensors there are, and where their chunks lie. No torch.

It is a pickle of `torch.distributed.checkpoint.metadata.Metadata`: state_dict_metadata maps a key to its shape, dtype
and chunks, storage_data maps (key, offset of a chunk) to a file, a position in it and a length. At this position lies a
`torch.save` archive of that chunk. `pickles.py` reads the pickle and imports nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3_npu import schema
from qwen3_npu.checkpoint.binary.dtypes import DType, Region, intersect
from qwen3_npu.checkpoint.binary.pickles import Unknown, read_pickle
from qwen3_npu.checkpoint.binary.torch_zip_write import TorchName, TorchPickler
from qwen3_npu.errors import UsageError, printable
from qwen3_npu.files import Seal, SealedFile
from qwen3_npu.schema import read_small

_MOST = 2**62  # bytes of a file
_MOST_METADATA = 1 << 30  # bytes; the largest models' are a few tens of MB
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
    """A stored tensor; its dtype is None if weights cannot have that dtype."""

    dtype: DType | None
    size: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


def read_metadata(path: Path) -> tuple[dict[str, StoredTensor], dict[str, StoredChunk]]:
    """Every tensor of the checkpoint, and every object (its region is empty).

    Raises:
        UsageError: the file is missing or damaged, or holds something that is not plain data.
    """
    data = read_small(path, _MOST_METADATA)
    where = str(path)
    content = _fields(read_pickle(data, path)[0], "state_dict_metadata", "planner_data", "storage_data")
    if not isinstance(content.get("storage_data"), dict) or not isinstance(content.get("state_dict_metadata"), dict):
        raise UsageError(f"{path} is not the metadata of a torch_dist checkpoint")
    places: dict[str, dict[tuple[int, ...], object]] = {}
    objects: dict[str, StoredChunk] = {}
    for index, info in content["storage_data"].items():
        fields = _fields(index, "fqn", "offset", "index")
        key = schema.text(fields.get("fqn"), f"{where}: a key")
        if fields.get("offset") is None:
            objects[key] = _chunk((), info, f"{where}: {printable(key)}")
        elif (
            places.setdefault(key, {}).setdefault(schema.counts(fields["offset"], f"{where}: {key}"), info) is not info
        ):
            raise UsageError(f"{where}: {printable(key)} has two chunks at {list(fields['offset'])}")
    tensors = {}
    for key, entry in content["state_dict_metadata"].items():
        schema.text(key, f"{where}: a key")
        fields = _fields(entry, "properties", "size", "chunks")
        if "size" in fields:  # else an object, not a tensor
            tensors[key] = _tensor(fields, places.pop(key, {}), f"{where}: {printable(key)}")
    if places:
        raise UsageError(f"{where}: {printable(min(places))} has chunks but no size")
    return tensors, objects


def _tensor(fields: Mapping[str, object], places: dict[tuple[int, ...], Any], where: str) -> StoredTensor:
    """A tensor whose chunks lie inside it and do not overlap. A part without a chunk is not stored."""
    size = schema.counts(fields["size"], f"{where}: size")
    if math.prod(max(n, 1) for n in size) >= 2**60:
        raise UsageError(f"{where}: size {schema.shown(size)} is too large")
    regions: list[Region] = []
    for chunk in schema.sequence(fields.get("chunks"), f"{where}: chunks"):
        place = _fields(chunk, "offsets", "sizes")
        start = schema.counts(place.get("offsets"), f"{where}: offsets")
        shape = schema.counts(place.get("sizes"), f"{where}: sizes")
        if not len(start) == len(shape) == len(size) or any(
            a + n > whole for a, n, whole in zip(start, shape, size, strict=True)
        ):
            raise UsageError(f"{where}: a chunk of {list(shape)} at {list(start)} is not inside {list(size)}")
        regions.append(tuple((a, a + n) for a, n in zip(start, shape, strict=True)))
    _check_apart(regions, where)
    by_start = {tuple(a for a, _ in region): region for region in regions}
    if lost := places.keys() - by_start.keys():
        raise UsageError(f"{where}: a chunk at {list(min(lost))} has no place in the tensor")
    dtype = _fields(fields.get("properties"), "dtype").get("dtype")
    stored = tuple(_chunk(by_start[start], info, where) for start, info in places.items())
    return StoredTensor(dtype if isinstance(dtype, DType) else None, size, stored)


def _check_apart(regions: list[Region], where: str, axis: int = 0) -> None:
    """No two regions overlap, where those given have the same span in all dimensions before `axis`.

    Chunks nearly always form a grid: along each dimension two spans are equal or disjoint, so only chunks of the same
    span are compared. Otherwise each chunk is compared with every other one.
    """
    spans: dict[tuple[int, int], list[Region]] = {}
    for region in regions:
        if axis == len(region):
            if len(regions) > 1:
                raise UsageError(f"{where}: two chunks at {[start for start, _ in region]} overlap")
        elif region[axis][0] < region[axis][1]:
            spans.setdefault(region[axis], []).append(region)
    ordered = sorted(spans)
    if all(one[1] <= other[0] for one, other in itertools.pairwise(ordered)):
        for group in spans.values():
            _check_apart(group, where, axis + 1)
        return
    for one, other in itertools.combinations(regions, 2):
        if intersect(one, other):
            starts = [[start for start, _ in region] for region in (one, other)]
            raise UsageError(f"{where}: chunks at {starts[0]} and {starts[1]} overlap")


def _chunk(region: Region, info: object, where: str) -> StoredChunk:
    fields = _fields(info, "relative_path", "offset", "length")
    file = schema.text(fields.get("relative_path"), f"{where}: file")
    if Path(file).name != file or file in ("", ".", ".."):
        raise UsageError(f"{where}: a chunk in {schema.shown(file)}; a file beside it is expected")
    start = schema.integer(fields.get("offset"), f"{where}: offset", least=0, most=_MOST)
    return StoredChunk(
        region, file, start, schema.integer(fields.get("length"), f"{where}: length", least=0, most=_MOST)
    )


def _fields(value: object, *names: str) -> dict[str, Any]:
    """The fields of a dataclass in the pickle. They are constructor arguments or a state."""
    if not isinstance(value, Unknown):
        return {}
    state = value.state
    if isinstance(state, tuple):  # a __getstate__ of its own: the fields in order
        return dict(zip(names, state, strict=False))
    named = state if isinstance(state, dict) else {}
    return {**dict(zip(names, value.args, strict=False)), **named}


@functools.cache
def _name(module: str, name: str) -> TorchName:
    """The same object for the same name, so that the pickle stores it once."""
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
