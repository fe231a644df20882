"""Formats of lines: JSON lines, plain text, WikiText articles, comma-separated values."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence

import orjson

from qwen3_npu.data.read.blocks import BLOCK_BYTES, InputStream, RecordBlock, Splitter, checked_row, open_stream
from qwen3_npu.data.read.find import LINES, InputFile
from qwen3_npu.errors import UsageError

_LONGEST_FIELD = 64 << 20
BOM = b"\xef\xbb\xbf"  # UTF-8 of U+FEFF, which some editors write at the start of a file
# Keys of a record that hold lists of objects; any other such key holds the records.
_LISTS = (
    b"messages",
    b"conversations",
    b"tools",
    b"functions",
    b"history",
    b"chosen",
    b"rejected",
    b"tool_calls",
    b"content",
)
# orjson makes a float of an integer above 64 bits.
_LONG_INTEGER = re.compile(rb"[0-9]{19}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_WIKITEXT_TITLE = re.compile(rb"^ = [^=].* = \r?\n$")


def read_json_lines(file: InputFile, columns: Sequence[str]) -> Iterator[RecordBlock]:
    """One JSON object per line; blank lines are skipped."""
    with open_stream(file) as stream:
        check_shape(file, stream)
        yield from line_blocks(file, stream, json_record)


def read_text_lines(file: InputFile, columns: Sequence[str]) -> Iterator[RecordBlock]:
    """One document per line, in column `text`; blank lines are skipped."""
    with open_stream(file) as stream:
        yield from line_blocks(file, stream, _text_record)


def line_blocks(
    file: InputFile, stream: InputStream, decode: Callable[[bytes], dict[str, object]]
) -> Iterator[RecordBlock]:
    """Blocks of whole lines."""
    rest, number, before = b"", 1, 0
    while chunk := stream.reader.read(BLOCK_BYTES):
        lines = (rest + (chunk if before or rest else chunk.removeprefix(BOM))).split(b"\n")
        rest = lines.pop()
        if lines:
            now = stream.consumed()
            yield _block(file, lines, number, decode, size=now - before)
            number, before = number + len(lines), now
    if rest:
        yield _block(file, [rest], number, decode, size=file.size - before)


def _block(
    file: InputFile, lines: list[bytes], number: int, decode: Callable[[bytes], dict[str, object]], *, size: int
) -> RecordBlock:
    numbers: Sequence[int] = range(number, number + len(lines))
    if not all(map(bytes.strip, lines)):
        kept = [(n, line) for n, line in zip(numbers, lines, strict=True) if line.strip()]
        numbers, lines = [n for n, _ in kept], [line for _, line in kept]
    return RecordBlock(str(file.path), numbers, lines, decode, size=size)


def json_record(line: bytes) -> dict[str, object]:
    """One line of JSON -> a record. Raises: ValueError: it is none."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return _lenient_json(line, error)
    if not isinstance(record, dict):
        return checked_row(record)
    if not all(value.__class__ is str for value in record.values()) and _LONG_INTEGER.search(line):
        return _lenient_json(line, ValueError())
    return record


def _lenient_json(line: bytes, error: Exception) -> dict[str, object]:
    """JSON that Python writes and strict JSON refuses, such as NaN."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as wrong:
        raise ValueError(f"not UTF-8 (byte {wrong.start + 1} of the line)") from None
    except (ValueError, RecursionError):
        raise ValueError(f"not JSON: {error}") from None
    return checked_row(record)


def check_shape(file: InputFile, stream: InputStream) -> None:
    """Raises: UsageError: the file starts like JSON of another shape than an object per line."""
    start = stream.reader.peek(1 << 16).removeprefix(BOM).lstrip()
    first_line, _, others = start.partition(b"\n")
    first_line = first_line.strip()
    command = f"{shlex.quote(file.path.name)} > {shlex.quote(file.path.stem + '.lines.jsonl')}"
    if first_line.startswith(b"[") and file.format == LINES:
        raise UsageError(
            f"{file.path}:1: a JSON array starts here, where .jsonl has an object on each line; "
            f"rename it to .json, or: jq -c '.[]' {command}"
        )
    if others and first_line.startswith(b"{") and first_line.endswith((b"{", b"[", b",")):
        found = re.findall(rb'^\s*"([^"\\]+)"\s*:\s*\[\s*\{', start, re.MULTILINE)
        key = next((name.decode(errors="replace") for name in found if name not in _LISTS), None)
        inside, rule = ("each", ".") if key is None else (f"the records in its {key!r}", f".[{json.dumps(key)}][]")
        raise UsageError(
            f"{file.path}:1: an object over several lines starts here; {inside} must be on a line of its own: "
            f"jq -c '{rule}' {command}"
        )


def _text_record(line: bytes) -> dict[str, object]:
    try:
        return {"text": line.removesuffix(b"\r").decode("utf-8")}
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1})") from None


def read_wikitext(file: InputFile, columns: Sequence[str]) -> Iterator[RecordBlock]:
    """Articles of WikiText (wiki.train.tokens): one starts at each line ` = Title = ` between blank lines."""
    with open_stream(file) as stream:
        splitter = Splitter(file, stream, _text_record)
        article: list[bytes] = []
        start, blank_before = 1, True
        for number, (line, after) in enumerate(itertools.pairwise(_lines(stream)), start=1):
            if blank_before and not after.strip() and _WIKITEXT_TITLE.match(line):
                yield from _article(splitter, start, article)
                article, start = [], number
            article.append(line)
            blank_before = not line.strip()
        yield from _article(splitter, start, article)
        yield from splitter.rest()


def _lines(stream: InputStream) -> Iterator[bytes]:
    """Lines of a text, then an empty one."""
    yield next(stream.reader, b"").removeprefix(BOM)
    yield from stream.reader
    yield b""


def _article(splitter: Splitter, start: int, lines: list[bytes]) -> Iterator[RecordBlock]:
    if any(map(bytes.strip, lines)):
        text = b"".join(lines)
        yield from splitter.add(start, text, len(text))


def read_csv(file: InputFile, columns: Sequence[str]) -> Iterator[RecordBlock]:
    """Comma-separated values; the first line names the columns, every value is text."""
    csv.field_size_limit(_LONGEST_FIELD)
    with open_stream(file) as stream:
        text = io.TextIOWrapper(stream.reader, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(text, strict=True)
        try:
            header = next(rows, [])
            if not any(header):
                raise UsageError(f"{file.path}: the first line of a .csv names its columns; it is empty")
            splitter = Splitter(file, stream, lambda row: _csv_record(header, row))
            for row in filter(None, rows):
                yield from splitter.add(rows.line_num, row, sum(map(len, row)) + len(row))
            yield from splitter.rest()
        except csv.Error as error:
            raise UsageError(f"{file.path}:{rows.line_num}: {error}; a quote is probably not closed") from None


def _csv_record(header: list[str], row: list[str]) -> dict[str, object]:
    if len(row) != len(header):
        raise ValueError(f"{len(row)} values, but the first line names {len(header)} columns")
    if any(map(_SURROGATE.search, row)):
        raise ValueError("not UTF-8")
    return dict(zip(header, row, strict=True))
