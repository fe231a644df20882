"""Turns in tokens: a source (label -100), then a target, which is learned; and the truncation of long samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qwen3_npu.data.train.token_record import IGNORED


class Limits(NamedTuple):
    """Numbers of tokens of a turn that are kept."""

    source: int
    target: int


def limits(source: int, target: int, room: int) -> Limits:
    """The part of a turn that fits into `room` tokens: the longer part is truncated, or both in proportion.

    LLaMA-Factory's rule (0.9.4), which MindSpeed-LLM uses in preprocessing and in training.
    """
    if target * 2 < room:
        most = room
    elif source * 2 < room:
        most = room - source
    else:
        most = int(room * (target / (source + target)))
    kept = min(most, target)
    return Limits(min(max(room - kept, 0), source), kept)


def kept_tokens(turns: Sequence[tuple[int, int]], room: int) -> np.ndarray:
    """Which tokens of a sample are kept, int64; turns without room are left out.

    Args:
        turns: tokens of the source and of the target of each.
    """
    places, start, used = [np.zeros(0, np.int64)], 0, 0
    for source, target in turns:
        if used < room:
            keep = limits(source, target, room - used)
            places.append(np.arange(start, start + keep.source))
            places.append(np.arange(start + source, start + source + keep.target))
            used += keep.source + keep.target
        start += source + target
    return np.concatenate(places)


def turns_of(labels: np.ndarray) -> list[tuple[int, int]]:
    """Tokens of the source and of the target of each turn, as the labels show them."""
    learned = labels != IGNORED
    boundaries = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(labels)]
    runs = np.diff(boundaries).tolist()
    if len(labels) and learned[0]:
        runs.insert(0, 0)
    if len(runs) % 2:
        runs.append(0)
    return list(zip(runs[::2], runs[1::2], strict=True))
