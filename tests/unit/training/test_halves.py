"""A bfloat16 weight and the lower half of its float32 master are the master, to the bit."""

from __future__ import annotations

import torch

from qwen3_npu.training.update.halves import joined_master, split


def test_every_lower_half_comes_back_beside_odd_and_even_weights() -> None:
    uppers = torch.tensor([0x3F80, 0x3F81, 0x0000, 0x0001, 0x7F7E, 0x4242]).repeat_interleave(2)
    uppers[1::2] -= 0x8000  # the same numbers below zero
    bits = uppers.to(torch.int32).unsqueeze(1) * 65536 + torch.arange(65536, dtype=torch.int32)
    master = bits.flatten().contiguous().view(torch.float32)
    weight, low = master.bfloat16(), torch.empty(master.shape, dtype=torch.int16)
    second = torch.rand(master.shape, generator=torch.Generator().manual_seed(0))
    second[::7] = 0
    kept = second.clone()
    split(master, weight, low, kept)
    assert torch.equal(joined_master(weight, low, kept).view(torch.int32), master.view(torch.int32))
    assert torch.equal(kept.abs(), second)
    assert torch.signbit(kept).any(), "some are ties"
