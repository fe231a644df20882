"""Documents inside a sequence of tokens: their boundaries, positions and loss. No torch.

Borders are (0, ..., s): document k is [boundaries[k], boundaries[k + 1]).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen3_npu.data.train.token_file import Indexed
from qwen3_npu.errors import UsageError

_LOOKED_AT = 1000


def boundaries_at_eod(tokens: np.ndarray, eod: int) -> list[int]:
    """Documents that end with `eod`, which belongs to them (`--reset-attention-mask` in pretraining, as Megatron)."""
    ends = (np.flatnonzero(tokens == eod) + 1).tolist()
    return [0, *ends] if ends and ends[-1] == len(tokens) else [0, *ends, len(tokens)]


def segment_boundaries(segments: np.ndarray) -> list[int]:
    """Documents as numbers that change from one to the next (--neat-pack); padding, 0, is one document."""
    return [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), len(segments)]


def joined(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Borders of rows that are laid one after the other."""
    found, offset = [0], 0
    for boundaries in rows:
        found += [offset + border for border in boundaries[1:]]
        offset += boundaries[-1]
    return tuple(found)


def positions(boundaries: Sequence[int]) -> np.ndarray:
    """The place of each token in its document, int64 [s]."""
    starts, sizes = np.array(boundaries[:-1]), np.diff(boundaries)
    return np.arange(boundaries[-1]) - np.repeat(starts, sizes)


def find_eod(data: Indexed, flag: str) -> int:
    """The token that ends every document.

    Args:
        flag: what needs it, for the message.

    Raises:
        UsageError: documents do not end with one and the same token.
    """
    ends = np.cumsum(data.lengths[:_LOOKED_AT], dtype=np.int64) - 1
    last = np.unique(data.tokens[ends])
    if len(last) != 1 or data.lengths[:_LOOKED_AT].min() == 0:
        raise UsageError(
            f"{flag}: the documents of {data.prefix} do not end with an end-of-document token; "
            f"preprocess them with --append-eod"
        )
    return int(last[0])
