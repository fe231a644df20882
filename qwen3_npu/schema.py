"""Parse files of other programs strictly: regular files, JSON, fields of known types and ranges. No torch.

Every parsed file goes through this module. Anything that is not understood is a `UsageError` of one line that names the
place.
"""

from __future__ import annotations

import collections
import json
import math
import os
import stat
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from qwen3_npu.errors import UsageError, did_you_mean, printable

SMALL = 64 << 20  # bytes; no configuration, index or manifest is larger
D = TypeVar("D")
V = TypeVar("V")


class _Required:
    """Stands for no default."""


_REQUIRED = _Required()


def shown(value: object, limit: int = 60) -> str:
    """A value for a message: on one line, without control characters, not longer than `limit`."""
    if isinstance(value, str):
        text = repr(value[: limit + 1])
    elif value is None or isinstance(value, (bool, float)):
        text = "null" if value is None else str(value).lower()
    elif isinstance(value, int):
        text = str(value) if abs(value) < 10**limit else "a huge integer"
    elif isinstance(value, dict):
        text = f"an object of {len(value)}" if len(value) > 4 else _joined("{", value.items(), "}")
    elif isinstance(value, (list, tuple)):
        text = f"a list of {len(value)}" if len(value) > 8 else _joined("[", [(None, item) for item in value], "]")
    else:
        text = f"a {type(value).__name__}"
    return printable(text if len(text) <= limit else text[: limit - 3] + "...")


def _joined(start: str, items: Iterable[tuple[object, object]], end: str) -> str:
    def brief(value: object) -> str:
        return "..." if isinstance(value, (dict, list, tuple)) else shown(value, 30)

    return start + ", ".join(brief(v) if k is None else f"{brief(k)}: {brief(v)}" for k, v in items) + end


def open_regular(path: str | Path) -> int:
    """A file descriptor of a regular file; a directory, pipe or device is refused without waiting.

    Raises:
        UsageError: it is missing, may not be read, or is no regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be opened: {_reason(error)}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(f"{path} is not a regular file; a plain file is expected there")
    return fd


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def read_small(path: str | Path, limit: int = SMALL) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises:
        UsageError: see `open_regular`; or it is larger.
    """
    fd = open_regular(path)
    with open(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if size > limit:
            raise UsageError(f"{path} has {size} bytes; at most {limit} are expected of such a file")
        try:
            return file.read()
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {_reason(error)}") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        again = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it has {shown(again)} twice")
    for key in found:
        key.encode("utf-8")  # an error for half a surrogate pair
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"it has {name}, which JSON has not")


def _integer(digits: str) -> int:
    if digits == "-0":
        raise ValueError("it has -0, which is no integer")
    return int(digits)


def parse_json(data: bytes, where: str, *, strict: bool = False) -> object:
    """The value of a JSON text in UTF-8.

    Args:
        where: names the text in messages.
        strict: a key that an object has twice, NaN, Infinity, -0 and half a surrogate pair are errors; else the last
            key counts and the constants are floats, as in Python and in transformers.

    Raises:
        UsageError: it is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        text = data.decode("utf-8")
        if strict:
            return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_integer)
        return json.loads(text)
    except RecursionError:
        raise UsageError(f"{where} cannot be read as JSON: it is nested too deeply") from None
    except ValueError as error:
        raise UsageError(f"{where} cannot be read as JSON: {printable(str(error))}") from None


def read_json(path: str | Path, *, strict: bool = False) -> object:
    """The JSON value in a regular file. Raises: UsageError: see `read_small` and `parse_json`."""
    return parse_json(read_small(path), str(path), strict=strict)


def read_record(path: str | Path, *, strict: bool = False) -> Record:
    """The JSON object in a file. Raises: UsageError: see `read_json`; or it is another JSON value."""
    return record(read_json(path, strict=strict), str(path))


def integer(value: object, where: str, *, least: int | None = None, most: int | None = None) -> int:
    """An integer (no bool, no float) in a range. Raises: UsageError: it is none; `where` names it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{where} is {shown(value)}; an integer is expected")
    _check_range(value, where, least, most)
    return value


def number(value: object, where: str, *, least: float | None = None, most: float | None = None) -> float:
    """A finite integer or float in a range. Raises: UsageError: it is none; `where` names it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"{where} is {shown(value)}; a number is expected")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise UsageError(f"{where} is {shown(value)}; a finite number is expected")
    _check_range(found, where, least, most)
    return found


def _check_range(value: float, where: str, least: float | None, most: float | None) -> None:
    if least is not None and value < least:
        raise UsageError(f"{where} is {shown(value)}; at least {least} is expected")
    if most is not None and value > most:
        raise UsageError(f"{where} is {shown(value)}; at most {most} is expected")


def text(value: object, where: str) -> str:
    """A string. Raises: UsageError: it is none; `where` names it."""
    if not isinstance(value, str):
        raise UsageError(f"{where} is {shown(value)}; a string is expected")
    return value


def boolean(value: object, where: str) -> bool:
    """True or false. Raises: UsageError: it is neither; `where` names it."""
    if not isinstance(value, bool):
        raise UsageError(f"{where} is {shown(value)}; true or false is expected")
    return value


def sequence(value: object, where: str) -> Sequence[object]:
    """A list (or tuple). Raises: UsageError: it is none; `where` names it."""
    if not isinstance(value, (list, tuple)):
        raise UsageError(f"{where} is {shown(value)}; a list is expected")
    return value


def pair(value: object, where: str) -> tuple[object, object]:
    """A list of two values. Raises: UsageError: it is none; `where` names it."""
    if len(found := sequence(value, where)) != 2:
        raise UsageError(f"{where} is {shown(value)}; a pair is expected")
    return found[0], found[1]


def counts(value: object, where: str) -> tuple[int, ...]:
    """A list of integers of at least 0, e.g. a shape. Raises: UsageError: it is none; `where` names it."""
    return tuple(integer(item, f"{where}[{i}]", least=0) for i, item in enumerate(sequence(value, where)))


def record(value: object, where: str) -> Record:
    """An object whose keys are strings. Raises: UsageError: it is none; `where` names it."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{where} is {shown(value)}; a JSON object is expected")
    return Record(value, where)


class Record:
    """A JSON object that is read field by field.

    Each method takes a field's name and gives its value, checked. A field that is missing or null gives `default`;
    without one that is an error. `UsageError`s name the file and the field.
    """

    def __init__(self, fields: dict[str, object], where: str) -> None:
        self.fields, self.where = fields, where

    def _get(self, name: str, default: D | _Required, read: Callable[[object, str], V]) -> V | D:
        value = self.fields.get(name)
        if value is not None:
            return read(value, f"{self.where}: {printable(name)}")
        if isinstance(default, _Required):
            raise UsageError(f"{self.where} has no {printable(name)}")
        return default

    def integer(
        self, name: str, default: D | _Required = _REQUIRED, *, least: int | None = None, most: int | None = None
    ) -> int | D:
        """See `schema.integer`."""
        return self._get(name, default, lambda value, where: integer(value, where, least=least, most=most))

    def number(
        self, name: str, default: D | _Required = _REQUIRED, *, least: float | None = None, most: float | None = None
    ) -> float | D:
        """See `schema.number`."""
        return self._get(name, default, lambda value, where: number(value, where, least=least, most=most))

    def text(self, name: str, default: D | _Required = _REQUIRED) -> str | D:
        """See `schema.text`."""
        return self._get(name, default, text)

    def boolean(self, name: str, default: D | _Required = _REQUIRED) -> bool | D:
        """See `schema.boolean`."""
        return self._get(name, default, boolean)

    def sequence(self, name: str, default: D | _Required = _REQUIRED) -> Sequence[object] | D:
        """See `schema.sequence`."""
        return self._get(name, default, sequence)

    def counts(self, name: str, default: D | _Required = _REQUIRED) -> tuple[int, ...] | D:
        """See `schema.counts`."""
        return self._get(name, default, counts)

    def record(self, name: str, default: D | _Required = _REQUIRED) -> Record | D:
        """See `schema.record`."""
        return self._get(name, default, record)

    def only(self, known: Collection[str]) -> None:
        """Raises: UsageError: there is a field that is not among `known`."""
        for name in self.fields:
            if name not in known:
                hint = did_you_mean(name, known) if name.isprintable() else ""
                raise UsageError(f"{self.where}: {shown(name)} is not understood{hint}")
