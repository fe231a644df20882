"""Checksums of tensors' bits, and the names of tensors for messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_WORDS = (torch.int32, torch.int16, torch.uint8)


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of its bits as integers of up to 32 bits, an int32 scalar on its device, whose overflow wraps around.

    A flipped bit changes it by a power of two below 2**32, so always. NPUs add 64-bit integers slowly.
    """
    flat = tensor.detach().contiguous().view(-1)
    for words in _WORDS:
        ratio = max(words.itemsize // flat.element_size(), 1)
        if flat.numel() % ratio == 0 and flat.storage_offset() % ratio == 0:
            break
    return flat.view(words).sum(dtype=torch.int32)


def told_parameters(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """The parameters of this rank's model chunks, not wrapped; layers have their number in the whole model."""
    found = {}
    for chunk in chunks:
        numbers = {f"{i}": f"{layer.layer_number - 1}" for i, layer in enumerate(_layers(chunk))}
        for name, parameter in chunk.named_parameters():
            before, _, rest = name.partition("decoder.layers.")
            number, dot, inside = rest.partition(".")
            told = f"{before}decoder.layers.{numbers[number]}.{inside}" if dot and number in numbers else name
            found[told] = parameter
    return found


def _layers(chunk: torch.nn.Module) -> Sequence[Any]:
    decoder: Any = getattr(chunk, "decoder", None)
    return () if decoder is None else decoder.layers
