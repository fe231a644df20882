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
    record: str | None = flag(
        None,
        metavar="FILE",
        help="instead: train tiny models and write what each kernel, layer and gradient was: a numerics passport",
    )
    compare: str | None = flag(
        None,
        metavar="FILE",
        help="instead: train them here, with these --kernels, and name the first operator that rounding does not "
        "explain; reference: the passport that comes along (CPU, reference kernels)",
    )
    against: str | None = flag(
        None, metavar="FILE", help="with --compare: nothing is trained; two files, also of --fingerprint-interval"
    )

    def __post_init__(self) -> None:
        if self.record is not None and self.compare is not None:
            raise UsageError(f"--record {self.record} and --compare {self.compare}: give one of them")
        if self.against is not None and self.compare is None:
            raise UsageError(f"--against {self.against} needs --compare, the other file")
        try:
            re.compile(self.rows)
        except re.error as error:
            raise UsageError(f"--rows {self.rows} is no regular expression: {error}") from None
