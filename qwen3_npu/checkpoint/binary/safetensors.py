"""Read safetensors files by regions, and write them tensor by tensor. No torch.

Files that the safetensors library refuses are refused here too.

Format: https://github.com/huggingface/safetensors (8 bytes header length, JSON header, raw little-endian tensors that
fill the rest of the file without holes or overlaps).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qwen3_npu.checkpoint.binary.dtypes import BY_SAFETENSORS, U8, DType, Region, read_region
from qwen3_npu.errors import UsageError, printable
from qwen3_npu.files import Seal, SealedFile
from qwen3_npu.once import once_a_node
from qwen3_npu.schema import Record, open_regular, parse_json, record, shown

_MOST_HEADER = 100_000_000  # bytes, the library's limit
_MOST = 2**63 - 1  # bits of a tensor; the library counts in unsigned 64-bit integers, numpy in signed ones
# Bits of an element of each type of the format. Most are no weights' here, but their tensors take their place.
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8}
_BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32}
_BITS |= {"F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64}
_AGAIN = "download or copy it again"


@dataclasses.dataclass(frozen=True)
class _HeaderEntry:
    """A tensor of the header; offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """One open .safetensors file: names, shapes, dtypes; regions are read on demand.

    Attributes:
        header: name -> what the header says of the tensor.
    """

    def __init__(self, path: Path) -> None:
        """Raises: UsageError: the file is missing or truncated, or the safetensors library would refuse its header."""
        self.path = path
        self._opened: int | None = None
        said = json.loads(once_a_node("safetensors header", path, _header))
        self.start = said["start"]
        self.header = {
            name: _HeaderEntry(dtype, tuple(shape), *places)
            for name, (dtype, shape, *places) in said["tensors"].items()
        }

    @property
    def fd(self) -> int:
        """The open file; it is opened by the first read."""
        if self._opened is None:
            self._opened = open_regular(self.path)
        return self._opened

    def shape(self, name: str) -> tuple[int, ...]:
        return self.header[name].shape

    def dtype(self, name: str) -> DType:
        code = self.header[name].dtype
        if code not in BY_SAFETENSORS:
            raise UsageError(f"{self.path}: {printable(name)} has dtype {code}; supported: {', '.join(BY_SAFETENSORS)}")
        return BY_SAFETENSORS[code]

    def read(self, name: str, region: Region) -> np.ndarray:
        offset = self.start + self.header[name].start
        return read_region(self.fd, offset, self.shape(name), self.dtype(name), region=region, path=str(self.path))

    def read_bytes(self, name: str, region: Region) -> np.ndarray:
        """A part of a tensor with elements of one byte, as uint8."""
        offset = self.start + self.header[name].start
        return read_region(self.fd, offset, self.shape(name), U8, region=region, path=str(self.path))

    def close(self) -> None:
        if self._opened is not None:
            os.close(self._opened)
            self._opened = None


class SafetensorsWriter:
    """Writes one .safetensors file, tensor by tensor, in the announced order."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[DType, tuple[int, ...]]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in tensors.items():
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            header[name] = {"dtype": dtype.safetensors, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
        self.expected = list(tensors)
        self.file = SealedFile(path)
        self.file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, array: np.ndarray) -> None:
        if name != self.expected.pop(0):
            raise AssertionError(f"{name} written out of order")
        self.file.write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")

    def close(self) -> Seal:
        """Flush to disk. Closing before the last tensor is a programming error."""
        if self.expected:
            raise AssertionError(f"{len(self.expected)} tensors were not written")
        return self.file.close()


def _header(path: Path) -> str:
    """The offset of the first tensor, and dtype, shape and offsets of each, as JSON.

    Raises:
        UsageError: see `SafetensorsFile`.
    """
    fd = open_regular(path)
    try:
        size, length = os.fstat(fd).st_size, int.from_bytes(os.pread(fd, 8, 0), "little")
        if length > _MOST_HEADER:
            raise UsageError(f"{path} says that its header has {length} bytes; it is no safetensors file")
        if size < 8 or 8 + length > size:
            raise UsageError(f"{path} is not a complete safetensors file ({size} bytes); {_AGAIN}")
        header = parse_json(os.pread(fd, length, 8), f"{path}: the header", strict=True)
    finally:
        os.close(fd)
    entries = record(header, f"{path}: the header").fields
    _check_notes(entries.pop("__metadata__", None), path)
    tensors = {name: _entry(value, f"{path}: {shown(name)}") for name, value in entries.items()}
    _check_places(tensors, size - 8 - length, path)
    plain = {name: (entry.dtype, entry.shape, entry.start, entry.stop) for name, entry in tensors.items()}
    return json.dumps({"start": 8 + length, "tensors": plain})


def _check_notes(notes: object, path: Path) -> None:
    if notes is not None:
        fields = record(notes, f"{path}: __metadata__")
        for name in fields.fields:
            fields.text(name)


def _entry(value: object, where: str) -> _HeaderEntry:
    fields: Record = record(value, where)
    fields.only(("dtype", "shape", "data_offsets"))
    dtype, shape = fields.text("dtype"), fields.counts("shape")
    where_to = fields.counts("data_offsets")
    if dtype not in _BITS:
        raise UsageError(f"{where}: dtype {shown(dtype)} is none of safetensors")
    if len(where_to) != 2:
        raise UsageError(f"{where}: data_offsets {shown(where_to)}; a start and an end are expected")
    if math.prod(max(n, 1) for n in shape) * _BITS[dtype] > _MOST:  # empty tensors may not hide an overflow either
        raise UsageError(f"{where}: shape {shown(shape)} is too large")
    bits = math.prod(shape) * _BITS[dtype]
    start, stop = where_to
    if bits % 8 or stop - start != bits // 8:
        raise UsageError(f"{where}: {stop - start} bytes are not a tensor of shape {list(shape)} in {dtype}")
    return _HeaderEntry(dtype, shape, start, stop)


def _check_places(header: Mapping[str, _HeaderEntry], size: int, path: Path) -> None:
    """Check that the tensors fill the file: no overlap, no gap, nothing after them and nothing outside."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise UsageError(f"{path}: {shown(name)} is at byte {entry.start}, not {end}, of the tensors; {_AGAIN}")
        end = entry.stop
    if end > size:
        raise UsageError(f"{path} is truncated: {end} bytes of tensors expected, {size} there; {_AGAIN}")
    if end < size:
        raise UsageError(f"{path} has {size - end} bytes after its last tensor; {_AGAIN}")
