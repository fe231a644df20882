"""Packing: several samples in one of exactly --seq-length tokens, as MindSpeed-LLM packs (LLaMA-Factory's knapsacks).

Which samples go together depends on all lengths, so samples wait in temporary files; memory holds lengths only.
"""

from __future__ import annotations

import bisect
import os
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from qwen3_npu.data.train.token_file import IndexedWriter, publish
from qwen3_npu.progress import Progress

_TOGETHER = 64  # packs written at once


class PackRule(NamedTuple):
    """How to pack.

    Attributes:
        length: tokens of a pack; at least one is padding.
        pad: the padding token. Its label is -100.
        numbered: attention_mask holds the samples' numbers in the pack, from 1, and 0 for padding (--neat-pack);
            else 1 everywhere.
        subsets: number of parts of the samples that are packed separately (--n-subs).
    """

    length: int
    pad: int
    numbered: bool
    subsets: int


def knapsacks(lengths: np.ndarray, capacity: int) -> Iterator[list[int]]:
    """Groups of samples: always take the longest sample that still fits; among equal ones the last.

    Args:
        lengths: tokens of each sample, none above `capacity`.
    """
    order = np.argsort(lengths, kind="stable")
    present, starts = np.unique(lengths[order], return_index=True)
    sizes: list[int] = present.tolist()
    first: list[int] = starts.tolist()
    after = [*first[1:], len(order)]  # for each length, the index after its last sample that is left
    while sizes:
        chosen, room = [], capacity
        while (place := bisect.bisect_right(sizes, room) - 1) >= 0:
            after[place] -= 1
            chosen.append(int(order[after[place]]))
            room -= sizes[place]
            if after[place] == first[place]:
                del sizes[place], first[place], after[place]
        yield chosen


def pack(samples: Sequence[IndexedWriter], outputs: Sequence[IndexedWriter], rule: PackRule) -> int:
    """Pack and publish.

    Args:
        samples: unfinished writers of input_ids and labels.
        outputs: writers of input_ids, attention_mask and labels.

    Returns:
        The number of packs.
    """
    for writer in samples:
        writer.position()
    names, lengths_name = [w.prefix + ".bin.tmp" for w in samples], samples[0].prefix + ".len.tmp"
    lengths = np.fromfile(lengths_name, np.int32)
    offsets = np.concatenate(([0], np.cumsum(lengths[:-1], dtype=np.int64))) * 4
    files = [os.open(name, os.O_RDONLY) for name in names]
    try:
        packs = 0
        with Progress("pack", len(lengths), {"samples": "samples", "packs": "packs"}) as progress:
            for group in _groups(lengths, rule):
                _write(group, (lengths, offsets), files, outputs, rule=rule)
                progress.add(samples=sum(map(len, group)), packs=len(group))
                packs += len(group)
    finally:
        for file in files:
            os.close(file)
    publish(outputs)
    return packs


def _groups(lengths: np.ndarray, rule: PackRule) -> Iterator[list[array]]:
    """Groups of samples, in batches."""
    group: list[array] = []
    step = max(len(lengths) // rule.subsets, 1)
    for start in range(0, len(lengths), step):
        for chosen in knapsacks(lengths[start : start + step], rule.length - 1):
            group.append(array("q", (start + i for i in chosen)))
            if len(group) == _TOGETHER:
                yield group
                group = []
    if group:
        yield group


def _write(
    group: Sequence[array],
    samples: tuple[np.ndarray, np.ndarray],
    files: Sequence[int],
    outputs: Sequence[IndexedWriter],
    *,
    rule: PackRule,
) -> None:
    lengths, offsets = samples
    shape = len(group), rule.length
    ids, mask, labels = np.full(shape, rule.pad), np.full(shape, 0 if rule.numbered else 1), np.full(shape, -100)
    for row, chosen in enumerate(group):
        start = 0
        for number, sample in enumerate(chosen, start=1):
            length = int(lengths[sample])
            part = slice(start, start + length)
            for target, file in zip((ids, labels), files, strict=True):
                target[row, part] = np.frombuffer(os.pread(file, 4 * length, int(offsets[sample])), np.int32)
            if rule.numbered:
                mask[row, part] = number
            start += length
    sizes = np.full(len(group), rule.length, np.int32)
    for writer, array_ in zip(outputs, (ids, mask, labels), strict=True):
        writer.add(array_.reshape(-1), sizes)
