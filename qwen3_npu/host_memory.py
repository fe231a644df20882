"""Memory of the host that stands in for the device's. One place makes it, so that a trace can tell it apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch

is_being_made = False


def on_host(shape: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
    """An undefined tensor in the host's memory; pinned, the device copies from and to it while the host goes on."""
    global is_being_made
    is_being_made = True
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=pinned)
    finally:
        is_being_made = False
