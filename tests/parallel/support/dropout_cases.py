"""Trainings with dropout: on a simulated NPU, which notes what it drops, and on a CPU, which drops the same."""

from __future__ import annotations

import collections
from typing import Any
from unittest import mock

import numpy as np
import torch

from cases import train
from qwen3_npu.distributed.launch import World
from qwen3_npu.platform.base import Platform


def noted(platform: Platform, world: World, flags: list[str], steps: int, file: str) -> dict[str, Any]:
    """As `train`; the masks go to a file, in their order. "drawn": share that is dropped -> how many masks."""
    from sim import dropout

    masks = dropout.DRAWN = []
    try:
        found = train(platform, world, flags, steps)
    finally:
        dropout.DRAWN = None
    np.savez(file, *[mask.numpy() for mask in masks])
    shares = collections.Counter(f"{1 - mask.float().mean().item():.1f}" for mask in masks)
    return {**found, "drawn": dict(shares)}


def replayed(platform: Platform, world: World, flags: list[str], steps: int, file: str) -> dict[str, Any]:
    """As `train`, with these masks."""
    with np.load(file) as archive:
        masks = iter([torch.from_numpy(archive[name]) for name in archive.files])

    def dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        assert not inplace
        return x * next(masks).view_as(x) / (1 - p) if training and p else x

    with mock.patch.object(torch.nn.functional, "dropout", dropout):
        found = train(platform, world, flags, steps)
    assert next(masks, None) is None, "a mask was drawn and not used"
    return found
