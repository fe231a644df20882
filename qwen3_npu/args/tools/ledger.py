"""Flags of `python -m qwen3_npu.ledger`."""

from __future__ import annotations

import dataclasses

from qwen3_npu.cli import flag


@dataclasses.dataclass(frozen=True, kw_only=True)
class LedgerArgs:
    """what to read"""

    run_dir: str = flag(metavar="DIR", help="--tensorboard-dir of a training")
    picture: str | None = flag(None, metavar="FILE", help="file of the picture; default: ledger.png in --run-dir")
    profile_path: str | None = flag(
        None, metavar="DIR", help="a recording of --profile on an NPU, for msprof-analyze if that is installed"
    )
