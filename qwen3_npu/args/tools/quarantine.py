"""Flags of `python -m qwen3_npu.data`."""

from __future__ import annotations

import dataclasses

from qwen3_npu.cli import flag


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuarantineArgs:
    """what to show"""

    show_quarantine: str = flag(metavar="DIR", help="--save of a training, or its quarantine.jsonl")
    tokenizer_name_or_path: str | None = flag(
        None, metavar="DIR", names=("--tokenizer-model",), help="tokenizer folder; default: token ids are shown"
    )
