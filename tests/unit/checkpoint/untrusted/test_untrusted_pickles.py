"""torch files of any bytes: what torch.load reads is read the same, anything else is refused in one line."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutations import damaged_bytes

from qwen3_npu.checkpoint.binary.dtypes import BF16, DTYPES, full
from qwen3_npu.checkpoint.binary.pickles import TensorRef, read_pickle
from qwen3_npu.checkpoint.binary.torch_zip_read import PtFile
from qwen3_npu.errors import UsageError

HERE = Path("x.pt")


def plain(data: bytes) -> Any:
    return read_pickle(data, HERE)[0]


def same(mine: Any, torchs: Any, file: PtFile) -> bool:
    """A value of this reader is torch's; its tensors have the same bytes."""
    if isinstance(torchs, torch.Tensor):
        if mine.dtype is None:
            return tuple(torchs.shape) == mine.shape
        bits = torchs.contiguous().view(torch.uint8 if mine.dtype.itemsize == 1 else torch.int16).numpy().tobytes()
        return mine.shape == tuple(torchs.shape) and bits == file.read(mine, mine.shape, full(mine.shape)).tobytes()
    if isinstance(torchs, dict):
        return list(mine) == list(torchs) and all(same(mine[key], torchs[key], file) for key in torchs)
    if isinstance(torchs, argparse.Namespace):
        return same(vars(mine), vars(torchs), file)
    return mine == (list(torchs) if isinstance(torchs, collections.deque) else torchs)


def content() -> dict[str, Any]:
    """A checkpoint of several kinds of containers and dtypes. 16-bit types only: views as integers are short."""
    model: dict[str, Any] = collections.defaultdict(dict)
    model["embedding"]["weight"] = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    model["layer"] = collections.OrderedDict(norm=torch.ones(5, dtype=torch.float16), empty=torch.zeros(0).half())
    args = argparse.Namespace(hidden_size=8, names=["a", "b"], rate=1.5, nothing=None)
    return {"model": model, "args": args, "queue": collections.deque([1, 2], 4), "seen": {1, 2}, "t": (1, (2, "x"))}


def test_plain_containers_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "a.pt")
    file = PtFile(tmp_path / "a.pt")
    assert same(file.content, torch.load(tmp_path / "a.pt", weights_only=False), file)
    assert type(file.content["model"]) is dict
    assert type(file.content["model"]["layer"]) is dict
    file.close()


def test_a_state_dict_of_modules_is_read(tmp_path: Path) -> None:
    """It is an OrderedDict with an attribute, and holds parameters."""
    module = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    torch.save({"model": module.state_dict(), "parameter": module.weight}, tmp_path / "a.pt")
    file = PtFile(tmp_path / "a.pt")
    assert same(file.content["model"], dict(module.state_dict()), file)
    assert same(file.content["parameter"], module.weight.detach(), file)
    file.close()


def test_files_without_crc_are_read(tmp_path: Path) -> None:
    """torch can leave the checksums out; they are zero then."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content(), tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    file = PtFile(tmp_path / "a.pt")
    assert same(file.content, torch.load(tmp_path / "a.pt", weights_only=False), file)
    file.close()


# --- pickles that are attacks ----------------------------------------------------------------------------------------

G = {  # a name, as protocol 2 writes it
    "bf16": b"ctorch\nbfloat16\n",
    "namespace": b"cargparse\nNamespace\n",
    "rebuild": b"ctorch._utils\n_rebuild_tensor_v2\n",
    "ordered": b"ccollections\nOrderedDict\n",
}
STATE = b"}X\x05\x00\x00\x00torchX\x07\x00\x00\x00float16s"  # {"torch": "float16"}
ATTACKS: dict[str, bytes] = {
    "state of a dtype": G["bf16"] + STATE + b"b.",
    "slots of a dtype": G["bf16"] + b"N" + STATE + b"\x86b.",
    "state of a class": G["namespace"] + b"N" + STATE + b"\x86b.",
    "state of a function": G["rebuild"] + STATE + b"b.",
    "slots of a namespace": G["namespace"] + b")\x81N" + STATE + b"\x86b.",
    "another class of a namespace": G["namespace"] + b")\x81}X\x09\x00\x00\x00__class__K\x01sb.",
    "namespace of numbers": G["namespace"] + b")\x81}K\x01K\x02sb.",
    "items of a dtype": G["bf16"] + b"K\x01K\x02s.",
    "a call of a value": b"K\x01)R.",
    "eval": b"cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
    "an import that is not called": b"cos\nsystem\n.",
    "nested tuples": b")" + b"\x85" * 200_000 + b".",
    "nested tuples as a key": b"}(" + b")" + b"\x85" * 200_000 + b"K\x01u.",
    "shared tuples as a key": b"}(K\x01" + b"2\x86" * 80 + b"K\x01u.",
    "nested tuples in a set": b"\x8f()" + b"\x85" * 200_000 + b"\x90.",
    "nested lists": b"]" * 100_000 + b"a" * 99_999 + b".",
    "an old protocol": b"I01\n.",
    "a length past the end": b"X\xff\xff\xff\x7fab.",
    "a huge frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.",
    "no end": b"}",
    "nothing": b"",
    "an unknown memo": b"h\x07.",
}
HARMLESS = {"nested tuples", "nested lists", "a huge frame"}  # they are plain values


@pytest.mark.parametrize("name", ATTACKS)
def test_a_pickle_changes_nothing_but_plain_values(name: str) -> None:
    before = dict(vars(argparse.Namespace)), [vars(dtype).copy() for dtype in DTYPES]
    if name in HARMLESS:
        plain(b"\x80\x02" + ATTACKS[name])
    else:
        with pytest.raises(UsageError) as caught:
            plain(b"\x80\x02" + ATTACKS[name])
        assert str(caught.value).isprintable()
    assert (dict(vars(argparse.Namespace)), [vars(dtype) for dtype in DTYPES]) == before
    assert BF16.torch == "bfloat16"


def storage(numel: int = 6, key: bytes = b"0") -> bytes:
    size = struct.pack("<i", numel)
    return (
        b"(X\x07\x00\x00\x00storagectorch\nBFloat16Storage\nX\x01\x00\x00\x00"
        + key
        + b"X\x03\x00\x00\x00cpuJ"
        + (size + b"tQ")
    )


def tensor(shape: tuple, stride: tuple, offset: int = 0, numel: int = 6) -> bytes:
    def numbers(values: tuple) -> bytes:
        return b"(" + b"".join(pickle.dumps(v, protocol=2)[2:-1] for v in values) + b"t"

    rest = b"J" + struct.pack("<i", offset) + numbers(shape) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02" + G["rebuild"] + b"(" + storage(numel) + rest + b"tR."


TENSORS = {
    "larger than its storage": tensor((7,), (1,)),
    "an offset": tensor((6,), (1,), 1),
    "a negative offset": tensor((2,), (1,), -1),
    "a negative stride": tensor((2,), (-1,), 3),
    "a large stride": tensor((2, 2), (5, 1)),
    "a stride too few": tensor((2, 2), (1,)),
    "a negative size": tensor((-1,), (1,)),
    "a float size": tensor((2.0,), (1,)),
    "a bool size": tensor((True,), (1,)),
    "a huge size": tensor((2**64,), (0,)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_lies_inside_its_storage(name: str) -> None:
    assert plain(tensor((2, 3), (3, 1))) == TensorRef("0", BF16, (2, 3), (3, 1), offset=0)
    with pytest.raises(UsageError, match=r"x\.pt cannot be read"):
        plain(TENSORS[name])


# --- archives --------------------------------------------------------------------------------------------------------


def rewritten(data: bytes, change: Callable[[dict[str, bytes]], Any], **options: Any) -> bytes:
    """An archive with other entries, in zipfile's own writing."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    change(parts)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **options) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return out.getvalue()


def halved(parts: dict[str, bytes]) -> None:
    parts["a/data/0"] = parts["a/data/0"][:12]


def central(data: bytes, name: bytes, at: int, value: bytes) -> bytes:
    """Change a field of an entry in the central directory."""
    start = data.rindex(name)
    out = bytearray(data)
    out[start - 46 + at : start - 46 + at + len(value)] = value
    return bytes(out)


ARCHIVES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "halved": (lambda d: rewritten(d, halved), "has 12 bytes, not 12 elements of bfloat16"),
    "longer": (lambda d: rewritten(d, lambda p: p.update({"a/data/0": p["a/data/0"] * 2})), "has 48 bytes"),
    "gone": (lambda d: rewritten(d, lambda p: p.pop("a/data/1")), "lacks the data of a tensor"),
    "big-endian": (lambda d: rewritten(d, lambda p: p.update({"a/byteorder": b"big"})), "byte order b'big'"),
    "two checkpoints": (lambda d: rewritten(d, lambda p: p.update({"b/data.pkl": b"N."})), "has 2 data.pkl"),
    "TorchScript": (lambda d: rewritten(d, lambda p: p.update({"a/constants.pkl": b""})), "TorchScript"),
    "compressed": (lambda d: rewritten(d, len, compression=zipfile.ZIP_DEFLATED), "is not a complete torch checkpoint"),
    "a bomb": (lambda d: central(d, b"a/data.pkl", 24, b"\xff\xff\xff\x7f"), "is not a complete torch checkpoint"),
    "shifted": (lambda d: central(d, b"a/data/0", 42, b"\x01"), "is not a complete torch checkpoint"),
    "overlapping": (lambda d: central(d, b"a/data/1", 42, b"\x00\x00\x00\x00"), "is not a complete torch checkpoint"),
    "one bit": (lambda d: d.replace(b"\x80\x3f\x00\x40", b"\x81\x3f\x00\x40", 1), "the CRC-32 of data/0 is another"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_contradicts_itself_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(content(), path)
    change, message = ARCHIVES[name]
    damaged = change(path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    with pytest.raises(UsageError, match=message):
        read_all(path)


def read_all(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of the content above."""
    file = PtFile(path)
    try:
        model = file.content["model"] if isinstance(file.content, dict) else {}
        tensors = [t for part in model.values() for t in part.values()]
        return {str(i): file.read(t, t.shape, full(t.shape)) for i, t in enumerate(tensors) if type(t) is TensorRef}
    except (KeyError, AttributeError):
        return {}  # another content than it was; whose reader checks names
    finally:
        file.close()


def test_thousands_of_damaged_archives_give_the_right_tensors_or_are_refused(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "a.pt"
    torch.save(content(), path)
    whole, expected = path.read_bytes(), {k: v.tobytes() for k, v in read_all(path).items()}
    outcomes: collections.Counter[str] = collections.Counter()
    for _ in range(2000):
        path.write_bytes(damaged_bytes(whole, rng))
        refusal = ""
        try:
            found = {name: array.tobytes() for name, array in read_all(path).items()}
        except UsageError as error:
            refusal = str(error)
        if refusal:
            assert refusal.isprintable()
        else:
            assert found == expected, "a damaged file gave other tensors"
        outcomes["refused" if refusal else "read"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 100, outcomes


def test_thousands_of_damaged_pickles_are_plain_or_refused() -> None:
    rng = random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = {"model": {"a": 1, "b": (2.5, "x" * 9)}, "args": argparse.Namespace(x=[1], y={2}), "o": 2**70}
    for protocol in (2, 3, 4, 5):
        data = pickle.dumps(state, protocol)
        assert plain(data)["args"] == state["args"]
        for _ in range(1000):
            try:
                plain(damaged_bytes(data, rng))
            except UsageError as error:
                assert str(error).isprintable()  # noqa: PT017 - either outcome is right


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(UsageError, match="not a regular file"):
        PtFile(tmp_path / "pipe.pt")
