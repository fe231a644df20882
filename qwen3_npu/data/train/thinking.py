"""Which tokens are thoughts. No torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class ThinkTokens:
    """The tokenizer's numbers of `<think>` and `</think>`."""

    open: int
    close: int

    def mask(self, tokens: np.ndarray, boundaries: Sequence[int] | None) -> np.ndarray:
        """float32 [b, s]: 1 where the token after this one (the label) belongs to a thought, its marks included.

        Args:
            boundaries: of documents in a single row, (0, ..., s); None if each row is one document.
        """
        inside = np.zeros(tokens.shape, bool)
        for start, end in itertools.pairwise(boundaries or (0, tokens.shape[1])):
            part = tokens[:, start:end]
            closed = part == self.close
            depth = np.cumsum(part == self.open, axis=1) - np.cumsum(closed, axis=1)
            inside[:, start:end] = (depth > 0) | closed
        return np.pad(inside[:, 1:], ((0, 0), (0, 1))).astype(np.float32)
