"""The order of samples: a function of (seed, number of the sample), independent of the number of ranks and steps.

It uses only the integer arithmetic below, so it does not depend on the version of any library.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BLOCK = 1 << 16


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `count` samples, int64: sorted by a hash of (seed, epoch, sample)."""
    key = _mixed(np.array([seed], np.uint64) ^ _mixed(np.array([epoch + 1], np.uint64)))
    return np.argsort(_mixed(np.arange(count, dtype=np.uint64) + key), kind="stable")


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea, Flood 2014), uint64: a bijection."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Epochs:
    """The samples of one data set: each sample once per epoch, each epoch in another order."""

    def __init__(self, count: int, seed: int, *, shuffle: bool = True) -> None:
        self.count, self.seed, self.shuffle = count, seed, shuffle
        # Two orders are kept: blends and evaluation read on both sides of the end of an epoch.
        self._order = functools.lru_cache(maxsize=2)(functools.partial(shuffled, count, seed))

    def __getitem__(self, number: int) -> int:
        """The sample at index `number` of an endless sequence of epochs."""
        epoch, place = divmod(number, self.count)
        return int(self._order(epoch)[place]) if self.shuffle else place


class Chosen(NamedTuple):
    """Sample `number` of data set `source`, both indices from 0."""

    source: int
    number: int


class Blend:
    """Takes data sets in turn, in proportion to weights, each in its own order.

    The j-th sample of a data set of weight w has the time (j + 1/2) / w; samples are drawn in the order of their times.
    So after n samples, n * w of them are from this data set, plus or minus one.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        total = sum(weights)
        self.weights = np.array([w / total for w in weights], np.float64)
        self._block = functools.lru_cache(maxsize=2)(self._make_block)

    def __getitem__(self, number: int) -> Chosen:
        """The data set of sample `number`, and the index of the sample in it."""
        block, place = divmod(number, _BLOCK)
        sources, numbers = self._block(block)
        return Chosen(int(sources[place]), int(numbers[place]))

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        weights, margin = self.weights, 2 * len(self.weights)
        start = block * _BLOCK
        # Before `early`, each set has given `given`; all that is due up to `late` is more than the block needs.
        early, late = max(start - margin, 0), start + _BLOCK + margin
        given = np.ceil(np.maximum(weights * early - 0.5, 0)).astype(np.int64)
        until = np.ceil(weights * late + 0.5).astype(np.int64)
        sources = np.repeat(np.arange(len(weights)), until - given)
        numbers = np.concatenate([np.arange(a, b) for a, b in zip(given, until, strict=True)])
        order = np.lexsort((sources, (numbers + 0.5) / weights[sources]))
        first = start - int(given.sum())
        chosen = order[first : first + _BLOCK]
        return sources[chosen], numbers[chosen]
