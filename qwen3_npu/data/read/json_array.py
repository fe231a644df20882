"""JSON files: an array of objects, read element by element; or lines, as in .jsonl."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from typing import TextIO

from qwen3_npu.data.read.blocks import BLOCK_BYTES, RecordBlock, Splitter, checked_row, open_stream
from qwen3_npu.data.read.find import InputFile
from qwen3_npu.data.read.lines import check_shape, json_record, line_blocks
from qwen3_npu.errors import UsageError

_LONGEST_ELEMENT = 64 << 20
_SPACE = b"\xef\xbb\xbf \t\r\n"


def read_json_records(file: InputFile, columns: Sequence[str]) -> Iterator[RecordBlock]:
    """Read an array or lines; the first character decides which."""
    with open_stream(file) as stream:
        if stream.reader.peek(4096).lstrip(_SPACE).startswith(b"["):
            splitter = Splitter(file, stream, checked_row)
            text = io.TextIOWrapper(stream.reader, encoding="utf-8-sig")
            for number, (element, size) in enumerate(_Array(file, text), start=1):
                yield from splitter.add(number, element, size)
            yield from splitter.rest()
        else:
            check_shape(file, stream)
            yield from line_blocks(file, stream, json_record)


class _Array:
    """The elements of a JSON array and how many characters each took; holds one element, not the array."""

    def __init__(self, file: InputFile, text: TextIO) -> None:
        self.file, self.text = file, text
        self.buffer, self.position, self.ended, self.count = "", 0, False, 0
        self.lines = 0  # before the buffer

    def __iter__(self) -> Iterator[tuple[object, int]]:
        self._mark()
        self.position += 1  # the opening bracket
        while (mark := self._mark()) != "]":
            if self.count:
                if mark != ",":
                    raise self._broken(f"a comma is missing before {mark!r}" if mark else "the file ends inside")
                self.position += 1
                self._mark()
            element, end = self._element()
            yield element, end - self.position
            self.position, self.count = end, self.count + 1
        self.position += 1
        if more := self._mark():
            raise UsageError(
                f"{self.file.path}:{self._line()}: the array ends before this line's {more!r}, after {self.count} "
                f"elements; a .json file is one array, or an object on each line: jq -c '.[]' FILE > NEW.jsonl"
            )

    def _line(self) -> int:
        """The line number of the current position."""
        return self.lines + self.buffer.count("\n", 0, self.position) + 1

    def _broken(self, what: str) -> UsageError:
        return UsageError(f"{self.file.path}:{self._line()}: the array breaks at element {self.count + 1}: {what}")

    def _more(self) -> None:
        left = self.buffer[self.position :]
        self.lines += self.buffer.count("\n", 0, self.position)
        try:
            # The buffer doubles: an element longer than a block is parsed a few times only.
            chunk = self.text.read(max(BLOCK_BYTES, len(left)))
        except UnicodeDecodeError:
            raise self._broken("not UTF-8") from None
        self.buffer, self.position, self.ended = left + chunk, 0, not chunk

    def _mark(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self.position < len(self.buffer) and self.buffer[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.buffer) or self.ended:
                return self.buffer[self.position : self.position + 1]
            self._more()

    def _element(self) -> tuple[object, int]:
        while True:
            try:
                element, end = json.JSONDecoder().raw_decode(self.buffer, self.position)
                # A number may go on in the next chunk.
                if end < len(self.buffer) or self.ended:
                    return element, end
            except (ValueError, RecursionError) as error:
                if self.ended or len(self.buffer) - self.position > _LONGEST_ELEMENT:
                    raise self._broken(f"not JSON: {error}") from None
            self._more()
