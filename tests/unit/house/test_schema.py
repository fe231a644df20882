"""What others wrote is parsed strictly: each refusal is one line that names file and place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3_npu import schema
from qwen3_npu.errors import UsageError, printable

FIELDS = schema.record(
    {"n": 3, "big": 10**40, "yes": True, "f": 2.0, "inf": float("inf"), "s": "a\x1b[2Jb", "l": [1, -1], "d": {"x": 1}},
    "file.json",
)
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "missing": (lambda: FIELDS.integer("m"), "file.json has no m"),
    "bool as int": (lambda: FIELDS.integer("yes"), "file.json: yes is true; an integer is expected"),
    "float as int": (lambda: FIELDS.integer("f"), "file.json: f is 2.0; an integer is expected"),
    "too small": (lambda: FIELDS.integer("n", least=4), "file.json: n is 3; at least 4 is expected"),
    "too large": (lambda: FIELDS.integer("big", most=9), "file.json: big is 10000"),
    "infinite": (lambda: FIELDS.number("inf"), "file.json: inf is inf; a finite number is expected"),
    "bool as number": (lambda: FIELDS.number("yes"), "a number is expected"),
    "text as flag": (lambda: FIELDS.boolean("s"), r"file.json: s is 'a\x1b[2Jb'; true or false is expected"),
    "int as text": (lambda: FIELDS.text("n"), "file.json: n is 3; a string is expected"),
    "negative count": (lambda: FIELDS.counts("l"), "file.json: l[1] is -1; at least 0 is expected"),
    "list as object": (lambda: FIELDS.record("l"), "file.json: l is [1, -1]; a JSON object is expected"),
    "unknown": (lambda: FIELDS.only(["n", "bigger"]), "file.json: 'big' is not understood"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_field_of_another_kind_is_refused_by_name(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(UsageError) as caught:
        call()
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_field_that_is_missing_or_null_has_its_default() -> None:
    fields = schema.record({"n": None}, "file.json")
    assert (fields.integer("n", 7), fields.text("s", None), FIELDS.number("n")) == (7, None, 3.0)


BYTES = {
    "not utf-8": (b'{"a": "\xff"}', "cannot be read as JSON"),
    "nested": (b"[" * 200_000, "nested too deeply"),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
    "twice": (b'{"a": 1, "a": 2}', "it has 'a' twice"),
    "NaN": (b'{"a": NaN}', "it has NaN"),
    "a list": (b"[1]", "a JSON object is expected"),
    "empty": (b"", "cannot be read as JSON"),
}


@pytest.mark.parametrize("name", BYTES)
def test_a_file_that_is_no_json_object_is_refused(name: str, tmp_path: Path) -> None:
    content, message = BYTES[name]
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        schema.read_record(tmp_path / "x.json", strict=True)
    assert str(tmp_path / "x.json") in str(caught.value)


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("fifo", "folder", "link", "missing", "nul\0"):
        with pytest.raises(UsageError, match=r"not a regular file|cannot be opened"):
            schema.read_small(tmp_path / name)
    with open(tmp_path / "large", "wb") as file:
        file.truncate(schema.SMALL + 1)
    with pytest.raises(UsageError, match="at most"):
        schema.read_small(tmp_path / "large")


def test_control_characters_are_escaped() -> None:
    assert printable("a\x1b[2J\r\n\u202e\u2028\x9b\ud800 中文\u3000é") == (
        "a\\x1b[2J\\r\\n\\u202e\\u2028\\x9b\\ud800 中文\u3000é"
    )
