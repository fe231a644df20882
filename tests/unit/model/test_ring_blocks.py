"""What a rank of the ring sees of another's keys, against the mask of the whole sequence."""

from __future__ import annotations

import random

import pytest
import torch

from qwen3_npu.distributed import ring


def documents(boundaries: tuple[int, ...]) -> torch.Tensor:
    """[length]: the number of each token's document."""
    starts = torch.zeros(boundaries[-1], dtype=torch.long)
    starts[list(boundaries[1:-1])] = 1
    return starts.cumsum(0)


def mask(boundaries: tuple[int, ...]) -> torch.Tensor:
    """[length, length]: causal within documents."""
    document, place = documents(boundaries), torch.arange(boundaries[-1])
    return (document[:, None] == document) & (place[:, None] >= place)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_one_block_is_the_mask(size: int, chunk: int) -> None:
    rng, length = random.Random(size + chunk), 2 * size * chunk
    for _ in range(40):
        inside = rng.sample(range(1, length), rng.randint(0, min(length - 1, 6)))
        boundaries = (0, *sorted(inside), length)
        whole = mask(boundaries)
        for rank in range(size):
            for source in range(size):
                rows, columns = (ring.shard_indices(length, size, r) for r in (rank, source))
                seen = torch.zeros(2 * chunk, 2 * chunk, dtype=torch.bool)
                block = ring.visible(boundaries, chunk, size, rank, source=source)
                if block is not None:
                    inner = block.boundaries
                    seen[block.queries, block.keys] = True if inner is None else mask(inner)
                assert torch.equal(seen, whole[rows][:, columns]), (boundaries, rank, source, block)
