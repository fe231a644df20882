"""Host memory that is used in place of device memory. It is allocated here only, so that a trace can recognize it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

is_being_made = False


def host_tensor(shape: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
    """An uninitialized tensor in host memory. If it is pinned, the device copies from and to it asynchronously."""
    global is_being_made
    is_being_made = True
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=pinned)
    finally:
        is_being_made = False
