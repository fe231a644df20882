"""Flags of `python -m qwen3_npu.plan --trace`."""

from __future__ import annotations

import dataclasses

from qwen3_npu.cli import flag
from qwen3_npu.errors import UsageError
from qwen3_npu.numbers import number_list


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceArgs:
    """what is traced"""

    devices: int = flag(8, minimum=1, help="devices of the job")
    ranks: str | None = flag(
        None, metavar="R[,R...]", help="ranks to trace; default: the first rank of each stage that differs"
    )
    growth: str | None = flag(
        None,
        metavar="N[,N...]",
        help="instead, what a rank does besides computing in jobs of so many devices, multiples of --devices, e.g. "
        "8,64,512,4096: groups, collectives, bytes, waits, writers of a checkpoint; data parallelism grows",
    )
    hidden: bool = flag(
        False, help="instead, what communication nothing hides, without and with each way to hide it, of the first rank"
    )
    holders: int = flag(12, minimum=1, help="number of lines about memory at the peak")
    json: bool = flag(False, help="print JSON: static bytes, peak, holders, operations by kind, collectives by group")

    def __post_init__(self) -> None:
        for rank in number_list(self.ranks):
            if not 0 <= rank < self.devices:
                raise UsageError(f"--ranks {self.ranks}: {rank} is not between 0 and {self.devices - 1} (--devices)")
