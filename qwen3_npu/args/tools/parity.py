"""Flags of `python -m qwen3_npu.parity`."""

from __future__ import annotations

import dataclasses
import re

from qwen3_npu.cli import flag
from qwen3_npu.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityArgs:
    """what is compared"""

    rows: str = flag(
        "", metavar="REGEX", help="regular expression; only rows whose name matches; default: all that fit"
    )
    processes: int | None = flag(
        None, minimum=1, help="started here, without torchrun; default: one per device, on the CPU 4"
    )
    tolerance: float = flag(1e-5, minimum=0, help="largest relative difference of a loss or gradient that passes")
    list_rows: bool = flag(False, help="show the rows and stop")

    def __post_init__(self) -> None:
        try:
            re.compile(self.rows)
        except re.error as error:
            raise UsageError(f"--rows {self.rows} is no regular expression: {error}") from None
