"""The .metadata of torch_dist: torch itself writes and reads it; whatever contradicts itself is refused in one line."""

from __future__ import annotations

import collections
import dataclasses
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import ODD, damaged_bytes
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from qwen3_npu.checkpoint.formats.dist_metadata import read_metadata
from qwen3_npu.errors import UsageError

SIZE = torch.Size


def metadata() -> Metadata:
    """Two rows of two chunks of a [4, 6] tensor, and an object."""
    places = [((r, c), (2, 3)) for r in (0, 2) for c in (0, 3)]
    chunks = [ChunkStorageMetadata(SIZE(start), SIZE(shape)) for start, shape in places]
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), SIZE((4, 6)), chunks)
    storage = {
        MetadataIndex("w", SIZE(start), i): _StorageInfo("__0_0.distcp", 100 * i, 100)
        for i, (start, _) in enumerate(places)
    }
    storage[MetadataIndex("o")] = _StorageInfo("__0_0.distcp", 400, 10)
    return Metadata({"w": tensor, "o": BytesStorageMetadata()}, None, storage)


def read(value: Any, folder: Path) -> tuple:
    (folder / ".metadata").write_bytes(value if isinstance(value, bytes) else pickle.dumps(value))
    return read_metadata(folder / ".metadata")


def facts(found: tuple) -> tuple:
    """Region -> place of each chunk, in the plain numbers of both sides."""
    tensors, objects = found
    return (
        {
            key: (t.dtype.torch if t.dtype else None, t.size, {c.region: (c.file, c.start, c.length) for c in t.chunks})
            for key, t in tensors.items()
        },
        {key: (c.file, c.start, c.length) for key, c in objects.items()},
    )


def expected() -> tuple:
    regions = {}
    for index, info in metadata().storage_data.items():
        if index.offset is not None:
            region = tuple((start, start + n) for start, n in zip(index.offset, (2, 3), strict=True))
            regions[region] = (info.relative_path, info.offset, info.length)
    return {"w": ("bfloat16", (4, 6), regions)}, {"o": ("__0_0.distcp", 400, 10)}


def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    assert facts(read(metadata(), tmp_path)) == expected()


def change_chunk(i: int, start: Any, shape: Any) -> Callable[[Metadata], None]:
    def change(value: Metadata) -> None:
        chunk = value.state_dict_metadata["w"].chunks[i]
        chunk.offsets, chunk.sizes = start, shape

    return change


def change_tensor(**fields: Any) -> Callable[[Metadata], None]:
    return lambda value: vars(value.state_dict_metadata["w"]).update(fields)


def change_place(**fields: Any) -> Callable[[Metadata], None]:
    def change(value: Metadata) -> None:
        index = next(iter(value.storage_data))
        value.storage_data[index] = dataclasses.replace(value.storage_data[index], **fields)

    return change


WRONG: dict[str, tuple[Callable[[Metadata], Any], str]] = {
    "out of bounds": (change_chunk(3, SIZE((2, 3)), SIZE((2, 4))), "is not inside"),
    "overlapping": (change_chunk(0, SIZE((0, 0)), SIZE((2, 4))), "overlap"),
    "overlapping elsewhere": (change_chunk(1, SIZE((0, 3)), SIZE((3, 3))), "overlap"),
    "of other dimensions": (change_chunk(0, SIZE((0,)), SIZE((2,))), "is not inside"),
    "negative start": (change_chunk(0, (-1, 0), SIZE((2, 3))), "at least 0"),
    "float size": (change_chunk(0, SIZE((0, 0)), (2.0, 3)), "an integer is expected"),
    "no size": (change_chunk(0, SIZE((0, 0)), None), "a list is expected"),
    "huge tensor": (change_tensor(size=(2**40, 2**40)), "too large"),
    "size is text": (change_tensor(size="46"), "a list is expected"),
    "chunks are a number": (change_tensor(chunks=4), "a list is expected"),
    "a moved chunk": (change_chunk(3, SIZE((3, 3)), SIZE((1, 3))), "has no place"),
    "offset is text": (change_place(offset="1"), "an integer is expected"),
    "negative offset": (change_place(offset=-1), "at least 0"),
    "bool length": (change_place(length=True), "an integer is expected"),
    "another folder": (change_place(relative_path="../x"), "a file beside it is expected"),
    "no file": (change_place(relative_path=7), "a string is expected"),
    "a tensor without size": (lambda value: value.state_dict_metadata.pop("w"), "has chunks but no size"),
    "a numeric key": (lambda value: value.state_dict_metadata.update({5: None}), "a string is expected"),
    "storage is a list": (lambda value: vars(value).update(storage_data=[]), "is not the metadata"),
}


@pytest.mark.parametrize("name", WRONG)
def test_metadata_that_contradicts_itself_is_refused(name: str, tmp_path: Path) -> None:
    change, message = WRONG[name]
    value = metadata()
    change(value)
    with pytest.raises(UsageError, match=message) as caught:
        read(value, tmp_path)
    assert str(caught.value).isprintable()


def test_thousands_of_damaged_metadata_are_sound_or_refused(tmp_path: Path) -> None:
    rng = random.Random(0)
    whole, right = pickle.dumps(metadata()), expected()
    outcomes: collections.Counter[str] = collections.Counter()
    for turn in range(2000):
        value: Any = damaged_bytes(whole, rng)
        if turn % 2:
            value = metadata()
            target = rng.choice([value, *value.state_dict_metadata.values(), *value.state_dict_metadata["w"].chunks])
            if fields := vars(target):
                vars(target)[rng.choice(list(fields))] = rng.choice(ODD)
        refusal = ""
        try:
            tensors, _ = read(value, tmp_path)
        except UsageError as error:
            refusal = str(error)
        if refusal:
            assert refusal.isprintable()
            assert str(tmp_path) in refusal
        else:
            for tensor in tensors.values():  # whatever it says, it is sound: chunks inside, and apart
                cells = [cell for chunk in tensor.chunks for cell in cells_of(chunk.region)]
                assert len(cells) == len(set(cells))
                assert all(i < n for cell in cells for i, n in zip(cell, tensor.size, strict=True))
        outcomes["refused" if refusal else "read"] += 1
    assert min(outcomes.values()) > 100, outcomes
    assert facts(read(whole, tmp_path)) == right


def cells_of(region: tuple) -> list[tuple[int, ...]]:
    if not region:
        return [()]
    return [(i, *rest) for i in range(*region[0]) for rest in cells_of(region[1:])]
