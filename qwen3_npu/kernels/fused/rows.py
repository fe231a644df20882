"""Tensors as rows for Triton's kernels."""

from __future__ import annotations

import functools

import torch


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [outer, inner, n] whose last dimension is contiguous; a view wherever strides allow it."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.unsqueeze(0) if x.dim() == 2 else x.reshape(-1, *x.shape[-2:])


def power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of the GPU; a small number if Triton interprets on the host."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
