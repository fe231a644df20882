"""What --data-path names, checked before torch is imported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from qwen3_npu.args.training import DataArgs
from qwen3_npu.data.train.sft_dataset import open_instructions
from qwen3_npu.data.train.token_file import check_vocabulary, open_indexed
from qwen3_npu.errors import UsageError


def blend(data_path: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """`["0.3", "a", "0.7", "b"]` -> (["a", "b"], [0.3, 0.7]); `["a"]` -> (["a"], None).

    Raises:
        UsageError: weights and prefixes do not alternate.
    """

    def number(text: str) -> float | None:
        try:
            return float(text)
        except ValueError:
            return None

    weights = [number(text) for text in data_path[::2]]
    if len(data_path) > 1 and len(data_path) % 2 == 0 and None not in weights:
        if not all(w is not None and 0 < w < math.inf for w in weights):
            raise UsageError(f"--data-path {' '.join(data_path)}: weights must be above 0")
        return list(data_path[1::2]), [w for w in weights if w is not None]
    if any(number(text) is not None and not Path(text + ".idx").exists() for text in data_path):
        raise UsageError(f"--data-path {' '.join(data_path)}: give WEIGHT PREFIX pairs, or prefixes without any weight")
    return list(data_path), None


def check_data(data: DataArgs, vocab_size: int) -> None:
    """Open every file of --data-path as training will, and look at its tokens.

    Raises:
        UsageError: see `blend`, `open_indexed`, `open_instructions` and `check_vocabulary`.
    """
    prefixes, _ = blend(data.data_path)
    if data.is_instruction:
        open_instructions(prefixes, vocab_size, per_document=data.per_document)
    else:
        for prefix in prefixes:
            check_vocabulary(open_indexed(prefix), vocab_size)
