"""Safetensors files of any bytes: what the safetensors library refuses is refused, what it reads is read the same."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import safetensors
from mutations import damaged_bytes, damaged_json

from qwen3_npu.checkpoint.binary.dtypes import BY_SAFETENSORS, full
from qwen3_npu.checkpoint.binary.safetensors import SafetensorsFile
from qwen3_npu.errors import UsageError

# Where this reader is stricter than the library: keys twice, fields that the format has not, entries that are no
# objects, empty tensors of a size that numpy has not.
STRICTER = ("twice", "is not understood", "a JSON object is expected", "is too large")
FILE = "x.safetensors"


def put(folder: Path, header: bytes, data: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def library(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What the library reads; None: it refuses."""
    try:
        found = safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return None
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in found}


def agree(data: bytes, path: Path) -> bool:
    """Both readers give the same for a file, or this one refuses in one line; whether it was read."""
    path.write_bytes(data)
    expected = library(data)
    refusal = ""
    try:
        file = SafetensorsFile(path)
    except UsageError as error:
        refusal = str(error)
    if refusal:
        assert refusal.isprintable()
        assert str(path) in refusal
        assert expected is None or any(word in refusal for word in STRICTER), (refusal, data)
        return False
    assert expected is not None, data
    assert file.header.keys() == expected.keys()
    for name, (dtype, shape, content) in expected.items():
        assert (file.header[name].dtype, file.shape(name)) == (dtype, shape)
        if dtype in BY_SAFETENSORS:
            assert file.read(name, full(shape)).tobytes() == content
    file.close()
    return True


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "F16", "shape": [0, 7], "data_offsets": [32, 32]},
    "d": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
    "e": {"dtype": "F8_E4M3", "shape": [3, 2], "data_offsets": [40, 46]},
}
DATA = bytes(range(46))


def entry(**changes: object) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}).encode()


def two(second: list[int]) -> bytes:
    tensor = {"dtype": "F32", "shape": [2]}
    return json.dumps({"a": {**tensor, "data_offsets": [0, 8]}, "b": {**tensor, "data_offsets": second}}).encode()


REFUSED: dict[str, tuple[bytes, int]] = {  # header, bytes of data
    "overlapping": (two([4, 12]), 12),
    "the same place twice": (two([0, 8]), 8),
    "a hole": (two([12, 20]), 20),
    "shifted": (entry(data_offsets=[4, 12]), 12),
    "negative": (entry(data_offsets=[-8, 0]), 8),
    "backward": (entry(data_offsets=[8, 0]), 8),
    "three offsets": (entry(data_offsets=[0, 8, 8]), 8),
    "length against shape": (entry(shape=[3]), 8),
    "length against dtype": (entry(dtype="F16"), 8),
    "half a byte": (entry(dtype="F6_E2M3", data_offsets=[0, 1]), 1),
    "float shape": (entry(shape=[2.0]), 8),
    "bool shape": (entry(shape=[True], data_offsets=[0, 4]), 4),
    "huge shape": (entry(shape=[2**40, 2**40]), 8),
    "huge and empty shape": (entry(shape=[2**40, 2**40, 0], data_offsets=[0, 0]), 0),
    "shape above 64 bits": (entry(shape=[2**64, 0], data_offsets=[0, 0]), 0),
    "unknown dtype": (entry(dtype="F33"), 8),
    "no dtype": (b'{"a":{"shape":[2],"data_offsets":[0,8]}}', 8),
    "a field twice": (b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', 8),
    "minus zero": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', 8),
    "metadata of numbers": (b'{"__metadata__":{"a":1}}', 0),
    "a lone surrogate": (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
    "not UTF-8": (b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
    "a byte order mark": (b"\xef\xbb\xbf" + entry(), 8),
    "text after the header": (entry() + b"\0", 8),
    "bytes after the last tensor": (entry(), 9),
    "a missing byte": (entry(), 7),
    "bytes without tensors": (b"{}", 1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_library_refuses_is_refused(name: str, tmp_path: Path) -> None:
    header, size = REFUSED[name]
    data = put(tmp_path, header, bytes(size))
    assert library(data) is None
    assert not agree(data, tmp_path / FILE)


def test_a_header_above_the_librarys_limit_is_refused_unread(tmp_path: Path) -> None:
    assert not agree(put(tmp_path, b"{}", b"", length=100_000_001), tmp_path / FILE)


def test_a_tensor_of_two_entries_is_refused(tmp_path: Path) -> None:
    first = entry()[:-1]
    data = put(tmp_path, first + b"," + entry(data_offsets=[8, 16])[1:], bytes(16))
    assert not agree(data, tmp_path / FILE)


def test_thousands_of_damaged_files_are_read_as_the_library_reads_them(tmp_path: Path) -> None:
    rng = random.Random(0)
    text = json.dumps(HEADER).encode()
    assert agree(put(tmp_path, text, DATA), tmp_path / FILE)
    read = 0
    for turn in range(3000):
        if turn % 2:
            header = json.dumps(damaged_json(HEADER, rng)).encode()
            data = put(tmp_path, header, DATA[: rng.choice((46, 46, 46, 40))])
        else:
            data = damaged_bytes(put(tmp_path, text, DATA), rng)
        read += agree(data, tmp_path / FILE)
    assert 60 < read < 3000, "the damage is neither none nor all"


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"x": torch.arange(6.0).reshape(2, 3), "y": torch.ones(5, dtype=torch.bfloat16), "z": torch.zeros(0)}
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / FILE)
    assert np.array_equal(file.read("x", ((0, 2), (0, 3))), tensors["x"].numpy())
    assert np.array_equal(file.read("y", ((0, 5),)), tensors["y"].view(torch.int16).numpy())
    assert file.shape("z") == (0,)
    file.close()
