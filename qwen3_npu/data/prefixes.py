"""What --data-path names, checked before torch is imported."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from qwen3_npu.data.indexed import check_vocabulary, open_indexed
from qwen3_npu.data.instruction import InstructionFiles
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
        if any(w is None or w <= 0 for w in weights):
            raise UsageError(f"--data-path {' '.join(data_path)}: weights must be above 0")
        return list(data_path[1::2]), [w for w in weights if w is not None]
    if any(number(text) is not None and not Path(text + ".idx").exists() for text in data_path):
        raise UsageError(f"--data-path {' '.join(data_path)}: give WEIGHT PREFIX pairs, or prefixes without any weight")
    return list(data_path), None


def check_data(data_path: Sequence[str], vocab_size: int, *, instructions: bool = False) -> str:
    """Check every file of --data-path; a fingerprint of them all.

    Args:
        instructions: they are instruction data.

    Raises:
        UsageError: see `open_indexed`, `InstructionFiles` and `check_vocabulary`.
    """
    digest = hashlib.sha256()
    for prefix in blend(data_path)[0]:
        if instructions:
            files = InstructionFiles(prefix)
            check_vocabulary(files.ids, vocab_size)
            digest.update(files.fingerprint().encode())
            continue
        indexed = open_indexed(prefix)
        check_vocabulary(indexed, vocab_size)
        digest.update(indexed.fingerprint().encode())
    return digest.hexdigest()[:16]
