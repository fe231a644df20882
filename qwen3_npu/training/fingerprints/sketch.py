"""The sketch of a tensor: its squared norm, a few projections on random signs, its first values.

The mean squared difference of two tensors' projections has, over the signs, the squared norm of their difference as its
expectation (Johnson and Lindenstrauss; Achlioptas, 2003). A sign is the product of one for the row and one for the
column, so sketches of parts of the rows can be summed.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

PROJECTIONS, VALUES = 8, 4
NUMBERS = 1 + PROJECTIONS + VALUES
_PART = 1 << 24  # elements that are converted to float32 at a time


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """splitmix64 of each: the same on every machine and with every version."""
    with np.errstate(over="ignore"):
        z = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


@functools.lru_cache(maxsize=64)
def _signs(count: int, is_row: bool, device: torch.device) -> torch.Tensor:
    """[count, PROJECTIONS] float32 of -1 and 1."""
    bits = _mixed(np.arange(1, count + 1) * 2 + is_row)[:, None] >> np.arange(1, PROJECTIONS + 1, dtype=np.uint64)
    return torch.from_numpy((bits & np.uint64(1)).astype(np.float32) * 2 - 1).to(device)


@torch.no_grad()
def sketch(x: torch.Tensor, rows: torch.Tensor | None = None, length: int = 0) -> torch.Tensor:
    """[NUMBERS] float32, on x's device, without waiting.

    Args:
        rows: the rows (of `length` in the first dimension) that x holds, if it is a part. Its values are not kept then;
            the other numbers can be summed over the parts.
    """
    x = x.detach()
    if not x.numel():  # e.g. experts without tokens
        return torch.zeros(NUMBERS, device=x.device)
    flat = x.reshape(x.shape[0], -1) if x.dim() > 1 else x.reshape(1, -1)
    by_row, by_column = (_signs(max(length, len(flat)), True, x.device), _signs(flat.shape[1], False, x.device))
    by_row = by_row[: len(flat)] if rows is None else by_row[rows.to(x.device)]
    squares = torch.zeros((), device=x.device)
    projected = torch.zeros(PROJECTIONS, device=x.device)
    step = max(_PART // flat.shape[1], 1)
    for part, signs in zip(flat.split(step), by_row.split(step), strict=True):
        part = part.float()
        squares += part.square().sum()
        projected += ((part @ by_column) * signs).sum(0)
    first = torch.zeros(VALUES, device=x.device)
    if rows is None:
        head = flat.flatten()[:VALUES].float()
        first[: len(head)] = head
    return torch.cat((squares.view(1), projected, first))


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Estimated norm of the difference over the norm of the expected tensor; infinite if one is not finite."""
    if not np.isfinite(found[: 1 + PROJECTIONS]).all() or not np.isfinite(expected[: 1 + PROJECTIONS]).all():
        return float("inf")
    norms = [float(np.sqrt(numbers[0])) for numbers in (found, expected)]
    if norms[1] == 0:
        return 0.0 if norms[0] == 0 else float("inf")
    gap = found[1 : 1 + PROJECTIONS].astype(np.float64) - expected[1 : 1 + PROJECTIONS]
    return max(float(np.sqrt(np.square(gap).mean())), abs(norms[0] - norms[1])) / norms[1]
