"""NormalFloat 4 (QLoRA, arXiv:2305.14314): weights in 4 bits, with one float32 scale for each block of 64.

The numbers are those of bitsandbytes (https://github.com/bitsandbytes-foundation/bitsandbytes, version 0.50, its CPU
backend): the code of a weight is that of the nearest of 16 values after division by its block's largest magnitude, and
the first of two weights lies in the upper half of a byte. Scales may be quantized again (double quantization, section 3
of the paper; bitsandbytes' `compress_statistics`): 8 bits each, less their mean, with a float32 scale for each group of
256.
"""

from __future__ import annotations

import functools

import torch

BLOCK = 64
SCALES_PER_GROUP = 256  # scales that share a scale of their own
_PLACES = (1 << 16) - 1
# Quantiles of a normal distribution, between -1 and 1, with an exact 0 (appendix E of the paper).
VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_AT_ONCE = 1 << 22  # weights whose float32 values exist at the same time while a tensor is restored


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a tensor whose number of elements is a multiple of 64.

    Returns:
        codes: [n / 2] uint8. scales: [n / 64] float32.
    """
    values = torch.tensor(VALUES, device=weight.device)
    middles = (values[:-1] + values[1:]) / 2
    flat = weight.detach().reshape(-1)
    codes = torch.empty(flat.numel() // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(flat.numel() // BLOCK, device=weight.device)
    for start in range(0, flat.numel(), _AT_ONCE):
        part = flat[start : start + _AT_ONCE].float().view(-1, BLOCK)
        largest = part.abs().amax(-1)
        scaled = (part * (1.0 / largest.clamp(min=1e-38)).unsqueeze(-1)).clamp_(-1, 1).view(-1)
        found = torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8)
        codes[start // 2 : (start + part.numel()) // 2] = (found[::2] << 4) | found[1::2]
        scales[start // BLOCK : (start + part.numel()) // BLOCK] = largest
    return codes, scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weights, [n]: value times scale in float32, rounded once to `dtype`."""
    pairs = _pairs(codes.device)
    out = torch.empty(codes.numel() * 2, dtype=dtype, device=codes.device)
    for start in range(0, out.numel(), _AT_ONCE):
        stop = min(start + _AT_ONCE, out.numel())
        part = pairs.index_select(0, codes[start // 2 : stop // 2].int()).view(-1, BLOCK)
        out[start:stop] = part.mul_(scales[start // BLOCK : stop // BLOCK].unsqueeze(-1)).view(-1)
    return out


def largest(weight: torch.Tensor) -> torch.Tensor:
    """The scales that `quantize` gives a tensor, [n / 64] float32."""
    return weight.detach().reshape(-1, BLOCK).abs().amax(-1).float()


def quantize_scales(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The scales of a whole tensor in 8 bits.

    Args:
        scales: [blocks] float32.

    Returns:
        codes: [blocks] uint8. tops: [ceil(blocks / 256)] float32, of groups. mean: [] float32. A scale is again
        value of the code times top, plus mean.
    """
    values = dynamic_values(scales.device)
    mean = scales.mean()
    rest = scales - mean
    groups = torch.nn.functional.pad(rest, (0, -len(rest) % SCALES_PER_GROUP)).view(-1, SCALES_PER_GROUP)
    tops = groups.abs().amax(-1)
    scaled = (groups * (1.0 / tops.clamp(min=1e-38)).unsqueeze(-1)).clamp_(-1, 1)
    # bitsandbytes rounds to one of 65536 steps first, and then to the nearest value.
    place = ((scaled + 1) * 0.5 * _PLACES + 0.5).int()
    middles = 0.5 * (values[:-1] + values[1:])
    found = torch.bucketize(-1 + 2.0 * place / _PLACES, middles).masked_fill((tops == 0).unsqueeze(-1), 0)
    return found.view(-1)[: len(rest)].to(torch.uint8), tops, mean


@functools.lru_cache
def dynamic_values(device: torch.device) -> torch.Tensor:
    """[256] float32, sorted: the 8-bit values of arXiv:2110.02861 (section 2.1), signed.

    For each power of ten from 1e-6 to 1 twice as many fractions as for the one before, evenly spaced from 0.1 to 1 and
    taken in the middle; and 0 and 1.
    """
    parts = []
    for exponent in range(7):
        ends = torch.linspace(0.1, 1, 2**exponent + 1)
        parts.append(10.0 ** (exponent - 6) * ((ends[:-1] + ends[1:]) / 2))
    positive = torch.cat(parts)
    return torch.cat((-positive, positive, torch.tensor([0.0, 1.0]))).sort().values.to(device)


@functools.lru_cache
def _pairs(device: torch.device) -> torch.Tensor:
    """[256, 2] float32: the two values of each byte."""
    values = torch.tensor(VALUES)
    byte = torch.arange(256)
    return torch.stack((values[byte >> 4], values[byte & 15]), dim=1).to(device)
