"""Detect a loss or gradient norm far above those of the last steps."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

WINDOW = 128  # steps
_KEPT = 1024  # most steps kept; a rollback forgets the last of them
_BEFORE = 16  # steps whose median is what is expected next: a loss that falls quickly is no spike above an old one
_FEWEST, _FIRST = 16, 4  # fewest residuals for a judgement, and fewest steps for a residual
_MAD = 1.4826  # a normal distribution's deviation over its median absolute deviation
_OF_LARGEST = 2  # a spike is above so many times the largest residual
_LOSS, _NORM = 0.005, 0.2  # least deviation: of the loss, relative; of the norm's logarithm


class Seen(NamedTuple):
    """A step that was learned from."""

    step: int
    loss: float
    grad_norm: float


class SpikeLimits(NamedTuple):
    """Upper limits; a value above its limit is a spike."""

    loss: float
    grad_norm: float


class _Series:
    """Values, and the residual of each: its difference to the median of earlier values."""

    def __init__(self) -> None:
        self.last: list[float] = []
        self.residuals: list[tuple[int, float]] = []  # (step, residual)

    def add(self, step: int, value: float) -> None:
        if len(self.last) >= _FIRST:
            self.residuals = [*self.residuals[-WINDOW + 1 :], (step, value - statistics.median(self.last))]
        self.last = [*self.last[-_BEFORE + 1 :], value]

    def highest(self, sigma: float, least: float) -> float:
        """The highest allowed next value."""
        if len(self.residuals) < _FEWEST:
            return math.inf
        found = sorted(one for _, one in self.residuals)
        middle = statistics.median(found)
        deviation = max(_MAD * statistics.median(abs(one - middle) for one in found), least)
        return statistics.median(self.last) + middle + max(sigma * deviation, _OF_LARGEST * (found[-1] - middle))


class Detector:
    """The last steps, and the limits of the next one.

    A step's residual is its loss (or the logarithm of its gradient norm) minus the median of the 16 steps before. The
    residual of a spike is more than `sigma` deviations above the median of the last 128 residuals, and more than twice
    as far above it as any of them (losses with heavy tails often have one large value). The deviation is 1.4826 times
    the median absolute deviation, and at least 0.5 % of the loss, or 0.2 of the logarithm. Norms are products of many
    factors, hence the logarithm.

    Args:
        ceiling: a loss that no trained model has; infinite if losses are not those of tokens.
    """

    def __init__(self, sigma: float, ceiling: float = math.inf) -> None:
        self.sigma, self.ceiling = sigma, ceiling
        self.seen: collections.deque[Seen] = collections.deque(maxlen=_KEPT)
        self.losses, self.norms = _Series(), _Series()

    def add(self, step: int, loss: float, grad_norm: float) -> None:
        """A step that was learned from."""
        self.seen.append(Seen(step, loss, grad_norm))
        self.losses.add(step, loss)
        self.norms.add(step, math.log(max(grad_norm, 1e-30)))

    def rewind(self, step: int) -> None:
        """Forget the steps after this one."""
        self.restore(self.seen, step)

    def restore(self, seen: Iterable[Sequence[float]], step: int) -> None:
        """Restore the history up to a step, perhaps of an earlier process."""
        seen = list(seen)
        self.seen.clear()
        self.losses, self.norms = _Series(), _Series()
        for number, loss, grad_norm in seen:
            if number <= step:
                self.add(int(number), loss, grad_norm)

    def limits(self) -> SpikeLimits:
        """The limits of the next step."""
        usual = abs(self.losses.last[-1]) if self.losses.last else 0.0
        norm = self.norms.highest(self.sigma, _NORM)
        loss = self.losses.highest(self.sigma, _LOSS * usual)
        return SpikeLimits(min(loss, self.ceiling), math.exp(norm) if norm < 80 else math.inf)


def reason(loss: float, grad_norm: float, limits: SpikeLimits) -> str | None:
    """Why a step is a spike, or None."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return f"loss {loss:g}, grad norm {grad_norm:g}"
    if loss > limits.loss:
        return f"loss {loss:g} is above {limits.loss:.4g}"
    if grad_norm > limits.grad_norm:
        return f"grad norm {grad_norm:g} is above {limits.grad_norm:.4g}"
    return None
