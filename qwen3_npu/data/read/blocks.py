"""Blocks: consecutive records of one file, about a megabyte. The division into blocks depends on the file alone. One
thread reads and divides the file, and `parse_block` parses a block in another thread. Memory does not grow with the
size of a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import orjson

from qwen3_npu.data.read.find import InputFile

BLOCK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class RecordBlock:
    """Consecutive records of one file.

    Attributes:
        file: name of the file, for messages.
        numbers: the line (or row, where the format has no lines) of each record, from 1.
        items: undecoded records (JSON or text lines, rows of a table), as many as numbers.
        decode: one undecoded record -> a dict of columns; raises ValueError.
        size: bytes of the file that the block stands for.
    """

    file: str
    numbers: Sequence[int]
    items: Sequence[object]
    decode: Callable[[Any], dict[str, object]]
    size: int

    def head(self, count: int) -> RecordBlock:
        """The first records."""
        return dataclasses.replace(self, numbers=self.numbers[:count], items=self.items[:count])


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used, and why."""

    file: str
    number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number}: {self.reason}"


def parse_block(block: RecordBlock) -> tuple[list[tuple[int, dict[str, object]]], list[BadRecord]]:
    """The records of a block with their numbers, and those that cannot be read."""
    records, bad = [], []
    for number, item in zip(block.numbers, block.items, strict=True):
        try:
            records.append((number, block.decode(item)))
        except ValueError as error:
            bad.append(BadRecord(block.file, number, str(error)))
    return records, bad


def first(blocks: Iterable[RecordBlock], count: int | None) -> Iterator[RecordBlock]:
    """The blocks of the first `count` records; of all with None."""
    left = count
    for block in blocks:
        if left is None:
            yield block
        elif left > 0:
            yield block.head(left)
            left -= len(block.numbers)
        else:
            return


@dataclasses.dataclass(frozen=True)
class InputStream:
    """An opened file.

    Attributes:
        reader: its content, decompressed.
        consumed: bytes of the file on disk read so far.
    """

    reader: io.BufferedReader
    consumed: Callable[[], int]


class Splitter:
    """Collects records into blocks, for formats that must be read record by record."""

    def __init__(self, file: InputFile, stream: InputStream, decode: Callable[[Any], dict[str, object]]) -> None:
        self.file, self.stream, self.decode = str(file.path), stream, decode
        self.before = 0
        self._start()

    def _start(self) -> None:
        self.numbers: list[int] = []
        self.items: list[object] = []
        self.length = 0

    def add(self, number: int, item: object, length: int) -> Iterator[RecordBlock]:
        """Add a record of about `length` bytes. Returns the block if this record completes it."""
        self.numbers.append(number)
        self.items.append(item)
        self.length += length
        if self.length >= BLOCK_BYTES:
            yield from self.rest()

    def rest(self) -> Iterator[RecordBlock]:
        """What is left at the end of the file."""
        if self.items:
            now = self.stream.consumed()
            yield RecordBlock(self.file, self.numbers, self.items, self.decode, size=now - self.before)
            self.before = now
            self._start()


@contextlib.contextmanager
def open_stream(file: InputFile) -> Iterator[InputStream]:
    """Open a file for reading from its start to its end. A truncated compressed file raises OSError when it ends."""
    with file.path.open("rb") as raw:
        if file.compression is None:
            yield InputStream(raw, raw.tell)
        else:
            import pyarrow as pa  # slow to import; most inputs are not compressed

            inflated = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), file.compression)
            yield InputStream(io.BufferedReader(inflated, BLOCK_BYTES), raw.tell)


def checked_row(row: object) -> dict[str, object]:
    """A parsed JSON value as a record. Raises: ValueError: it is none."""
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is expected, not {type(row).__name__}")
    return checked_text(row)


def checked_text(record: object) -> Any:
    """The record itself. Raises: ValueError: its text holds half of a surrogate pair, which has no UTF-8 form."""
    try:
        orjson.dumps(record)
    except TypeError:  # or a number of more than 64 bits, which is allowed here
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("not valid Unicode: half of a surrogate pair") from None
    return record
