"""Lists of numbers as users write them."""

from __future__ import annotations

from collections.abc import Sequence

from qwen3_npu.errors import UsageError


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
    return sorted(value) if isinstance(value, set) else list(value)
