"""Dropout on the simulated device: which numbers are kept, and torch_npu's native_dropout with its mask of bits.

Semantics are those of CANN's documentation of aclnnDropoutGenMask and aclnnDropoutDoMask (ops-math, random/).
"""

from __future__ import annotations

import torch

# The masks that were drawn since a test asked for them, in their order.
DRAWN: list[torch.Tensor] | None = None
_BITS = 128  # a mask's length is a multiple of these
_PLACES = 2 ** torch.arange(8)


def kept(shape: torch.Size, keep: float, seed: int) -> torch.Tensor:
    """Which numbers stay, bool: the same for the same seed."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < keep


def note(mask: torch.Tensor) -> torch.Tensor:
    """The mask, which a test may ask for."""
    if DRAWN is not None:
        DRAWN.append(mask.clone())
    return mask


def _bytes(numbers: int) -> int:
    return -(-numbers // _BITS) * _BITS // 8


def forward(x: torch.Tensor, p: float, train: bool | None = True, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """native_dropout: the result, and a mask of one bit for each number, uint8."""
    if train is False:
        raise NotImplementedError("native_dropout outside of training is not emulated")
    mask = note(kept(x.shape, 1.0 - p, seed))
    bits = torch.zeros(_bytes(x.numel()) * 8, dtype=torch.long)
    bits[: x.numel()] = mask.flatten()
    return (x.float() * mask / (1.0 - p)).to(x.dtype), (bits.view(-1, 8) * _PLACES).sum(1).to(torch.uint8)


def backward(grad: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """native_dropout_backward."""
    if mask.dtype != torch.uint8 or mask.numel() != _bytes(grad.numel()):
        raise RuntimeError(f"native_dropout_backward: a mask of {mask.numel()} {mask.dtype} for {grad.numel()} numbers")
    bits = (mask.long().unsqueeze(1) & _PLACES).ne(0).flatten()[: grad.numel()]
    return (grad.float() * bits.view_as(grad) * scale).to(grad.dtype)
