"""Ulysses context parallelism (arXiv:2309.14509): each rank holds a consecutive part of the sequence. For attention,
ranks exchange sequence for heads, so that each rank has the full sequence of some heads, and exchange back afterwards.

s = local sequence, b = batch, n = query heads, g = key/value heads, d = head size, c = ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def shard_indices(length: int, size: int, rank: int) -> torch.Tensor:
    """Positions of a sequence that this rank holds: the rank-th of `size` equal parts."""
    part = length // size
    return torch.arange(rank * part, (rank + 1) * part)


def _exchange(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Entry i of the first dimension goes to rank i; entry i of the result came from rank i."""
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


def _to_heads(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[s, b, h, d] -> [c s, b, h / c, d]."""
    c = group.size()
    s, b, h, d = x.shape
    return _exchange(x.view(s, b, c, h // c, d).permute(2, 0, 1, 3, 4), group).view(c * s, b, h // c, d)


def _to_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[c s, b, h / c, d] -> [s, b, h, d]; the reverse."""
    c = group.size()
    s, b, h, d = x.shape
    return _exchange(x.reshape(c, s // c, b, h, d), group).permute(1, 2, 0, 3, 4).reshape(s // c, b, c * h, d)


class _Exchange(torch.autograd.Function):
    """One of the two exchanges; its gradient is the other."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, forth: bool) -> torch.Tensor:
        ctx.group, ctx.forth = group, forth
        return _to_heads(x, group) if forth else _to_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        return _to_sequence(grad, ctx.group) if ctx.forth else _to_heads(grad, ctx.group), None, None


def attention(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Attention over the full sequence.

    Args:
        attend: attention over a whole sequence, [S, b, n', d] x [S, b, g', d] -> [S, b, n', d].
        q: [s, b, n, d], n a multiple of the group's size.
        k, v: [s, b, g, d]. If the group's size does not divide g, key/value heads are repeated: until there is one per
            rank, or, if that number does not divide, one per query head.

    Returns:
        [s, b, n, d].
    """
    c, n, g = group.size(), q.shape[2], k.shape[2]
    if g % c:
        repeats = c // g if c % g == 0 else n // g
        k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    # One exchange for all three: rank i's share of q, k and v side by side.
    h = [x.shape[2] // c for x in (q, k, v)]
    mixed = torch.cat([x.unflatten(2, (c, -1)) for x in (q, k, v)], dim=3).flatten(2, 3)
    # Each alone: as views, what attention keeps of one for backward would hold the memory of all three.
    q, k, v = (x.contiguous() for x in _Exchange.apply(mixed, group, True).split(h, dim=2))
    return _Exchange.apply(attend(q, k, v), group, False)
