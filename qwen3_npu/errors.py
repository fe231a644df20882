"""The exception for errors that the user can fix, and helpers for its text."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class UsageError(ValueError):
    """The user asked for something impossible.

    The text names the flag or file, the value and the remedy. Entry points print it on one line, without a
    traceback, and exit with status 2 (`cli.run`).
    """


class Stopped(RuntimeError):
    """A run ended itself. Entry points print the reason and exit with status 1."""


class SaveFailed(Stopped):
    """A checkpoint could not be written; earlier ones are complete."""


_UNSHOWN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode categories: controls, formats, surrogates, line separators


def printable(text: str, keep: str = "") -> str:
    """The text with every control character escaped: it cannot move the cursor, hide text or begin a line.

    Args:
        keep: control characters that stay.
    """
    if text.isprintable():
        return text
    escaped = (c if c in keep or unicodedata.category(c) not in _UNSHOWN else ascii(c)[1:-1] for c in text)
    return "".join(escaped)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean X?"` for the closest of `known`, or an empty string."""
    bare = {name.lstrip("-"): name for name in known}  # leading dashes would make any two flags look alike
    close = difflib.get_close_matches(word.lstrip("-"), bare, n=1, cutoff=0.6)
    return f"; did you mean {bare[close[0]]}?" if close else ""


def choose(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`, or a `UsageError` that lists the known names (`what` is the flag)."""
    if name in table:
        return table[name]
    raise UsageError(f"unknown {what} {name}; known: {', '.join(table)}{did_you_mean(name, table)}")
