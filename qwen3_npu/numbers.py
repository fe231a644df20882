"""Numbers and lists of them as users write them."""

from __future__ import annotations

from collections.abc import Sequence

from qwen3_npu.errors import UsageError


def is_count(text: str) -> bool:
    """Whether a text is a whole number of at least 0, in plain digits, that fits into 64 bits."""
    return text.isascii() and text.isdigit() and len(text) < 19


def number_list(value: str | Sequence[int] | set[int] | None) -> list[int]:
    """`"94,95"`, `[94, 95]`, `{94, 95}` or nothing -> [94, 95] or [].

    Raises:
        UsageError: not numbers.
    """
    if not value:
        return []
    if isinstance(value, str):
        try:
            return [int(part) for part in value.split(",")]
        except ValueError:
            raise UsageError(f"{value!r} is not a list of numbers such as 94,95") from None
    listed: list[object] = list(value) if isinstance(value, (list, tuple, set)) else [value]
    found = [number for number in listed if isinstance(number, int) and not isinstance(number, bool)]
    if len(found) < len(listed):
        raise UsageError(f"{value!r} is not a list of numbers such as 94,95")
    return sorted(found) if isinstance(value, set) else found
