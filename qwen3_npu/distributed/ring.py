"""Ring context parallelism (arXiv:2310.01889): each rank holds its queries; keys and values are sent around the ring.

The sequence is divided into 2c chunks. Rank r of c holds chunks r and 2c-1-r: causal attention is then the same work
for every rank. While one pair of key/value chunks is used, the next one is transferred. Partial results are
merged by their log-sum-exp. Backward sends keys and values around again, together with their gradients.

Packed documents: chunks of two ranks share at most one document, the one across the boundary, so queries attend to one
full rectangle of another rank's keys. Attention to a rank's own keys is causal, document by document.

s = local sequence, b = batch, n = query heads, g = key/value heads, d = head size.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from qwen3_npu.kernels import Kernels


def chunk_numbers(size: int, rank: int) -> tuple[int, int]:
    """The numbers of the two chunks (of 2 x `size`) that a rank holds, in order."""
    return rank, 2 * size - 1 - rank


def shard_indices(length: int, size: int, rank: int) -> torch.Tensor:
    """Positions of a sequence that this rank holds."""
    chunk = length // (2 * size)
    return torch.cat([torch.arange(i * chunk, (i + 1) * chunk) for i in chunk_numbers(size, rank)])


@dataclasses.dataclass(frozen=True)
class AttentionBlock:
    """A part of the score matrix of this rank's queries and the present keys.

    Attributes:
        queries, keys: local rows.
        boundaries: documents of a diagonal block, starting at 0; None for a full rectangle.
    """

    queries: slice
    keys: slice
    boundaries: tuple[int, ...] | None


def visible(boundaries: Sequence[int], chunk: int, size: int, rank: int, *, source: int) -> AttentionBlock | None:
    """The keys of rank `source` that this rank's queries see: one block of neighbouring rows, or nothing.

    Args:
        boundaries: of the documents in the whole sequence, (0, ..., length).
        chunk: tokens of one chunk.
    """
    mine, theirs = ([n * chunk for n in chunk_numbers(size, holder)] for holder in (rank, source))
    if source == rank:
        # The rows of a document that begins in the first chunk and reaches into the second are side by side here.
        first, second = mine
        here = {b - first for b in boundaries if first <= b < first + chunk}
        here |= {b - second + chunk for b in boundaries if second < b < second + chunk}
        seam = {chunk} if any(first + chunk <= b <= second for b in boundaries) else set()
        everything = slice(0, 2 * chunk)
        return AttentionBlock(everything, everything, tuple(sorted({0, 2 * chunk} | here | seam)))
    # Either both of my chunks see only their first chunk, or my second chunk alone sees both of theirs.
    seen, seeing = (theirs[:1], mine) if source < rank else (theirs, mine[1:])
    # The document of the last key before the queries; it counts if it reaches into the chunk of the queries.
    document = bisect.bisect_right(boundaries, seen[-1] + chunk - 1) - 1
    start, end = boundaries[document], boundaries[document + 1]
    queries = sum(min(max(end - place, 0), chunk) for place in seeing)
    keys = sum(min(max(place + chunk - start, 0), chunk) for place in seen)
    if not queries:
        return None
    first_query, last_key = (2 - len(seeing)) * chunk, len(seen) * chunk
    return AttentionBlock(slice(first_query, first_query + queries), slice(last_key - keys, last_key), None)


class _Ring:
    """Sends tensors to the next rank and receives those of the previous one, while attention is computed."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        rank, size = group.rank(), group.size()
        self.next = dist.get_global_rank(group, (rank + 1) % size)
        self.previous = dist.get_global_rank(group, (rank - 1) % size)

    def start(self, tensor: torch.Tensor) -> tuple[torch.Tensor, list]:
        """Start a transfer; the tensor must not change until it is finished."""
        received = torch.empty_like(tensor)
        operations = [
            dist.P2POp(dist.isend, tensor, self.next, self.group),
            dist.P2POp(dist.irecv, received, self.previous, self.group),
        ]
        return received, dist.batch_isend_irecv(operations)

    @staticmethod
    def finish(transfer: tuple[torch.Tensor, list]) -> torch.Tensor:
        received, works = transfer
        for work in works:
            work.wait()
        return received


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        kv: torch.Tensor,
        boundaries: tuple[int, ...],
        scale: float,
        kernels: Kernels,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        size, rank = group.size(), group.rank()
        chunk = q.shape[0] // 2
        ring, here = _Ring(group), kv
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        lse = torch.full(q.shape[:-1], float("-inf"), dtype=torch.float32, device=q.device)
        for step in range(size):
            transfer = ring.start(here) if step < size - 1 else None
            block = visible(boundaries, chunk, size, rank, source=(rank - step) % size)
            if block is not None:
                k, v = here[0, block.keys], here[1, block.keys]
                part, part_lse = kernels.attention_block(
                    q[block.queries], k, v, scale=scale, cu_seqlens=block.boundaries
                )
                merge_block(out[block.queries], lse[block.queries], part, part_lse)
            if transfer is not None:
                here = ring.finish(transfer)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, kv, out, lse)
        ctx.options = boundaries, scale, kernels, group
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        q, kv, out, lse = ctx.saved_tensors
        boundaries, scale, kernels, group = ctx.options
        size, rank = group.size(), group.rank()
        chunk = q.shape[0] // 2
        ring, here = _Ring(group), kv
        grad = grad.contiguous()
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        # The gradient of the keys and values that are here; it is sent one step later, and ends at the rank that owns
        # them.
        dkv_transfer: tuple[torch.Tensor, list] | None = None
        for step in range(size):
            transfer = ring.start(here) if step < size - 1 else None
            mine = torch.zeros(kv.shape, dtype=torch.float32, device=kv.device)
            block = visible(boundaries, chunk, size, rank, source=(rank - step) % size)
            if block is not None:
                rows, keys = block.queries, block.keys
                dq_part, dk, dv = kernels.attention_block_backward(
                    grad[rows],
                    q[rows],
                    here[0, keys],
                    here[1, keys],
                    out=out[rows],
                    lse=lse[rows],
                    scale=scale,
                    cu_seqlens=block.boundaries,
                )
                dq[rows].add_(dq_part)  # dq[rows] += would also copy the rows onto themselves
                mine[0, keys].copy_(dk)
                mine[1, keys].copy_(dv)
            if dkv_transfer is not None:
                mine += ring.finish(dkv_transfer)
            dkv_transfer = ring.start(mine)
            if transfer is not None:
                here = ring.finish(transfer)
        assert dkv_transfer is not None  # the loop has at least one step
        dkv = ring.finish(dkv_transfer)
        return dq.to(q.dtype), dkv.to(kv.dtype), None, None, None, None


def merge_block(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Add a block's normalised result to the one so far, in place, each weighted by its share of the softmax's sum."""
    share = (part_lse - lse).sigmoid_().unsqueeze(-1)  # e^part_lse / (e^lse + e^part_lse)
    out.lerp_(part.to(out.dtype), share)
    torch.logaddexp(lse, part_lse, out=lse)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    boundaries: tuple[int, ...],
    scale: float,
    kernels: Kernels,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Causal attention over the full sequence.

    Args:
        q: [s, b, n, d]; k, v: [s, b, g, d], rows as `shard_indices` gives them, s even.
        boundaries: of the documents in the whole sequence, (0, ..., s x ranks).

    Returns:
        [s, b, n, d].
    """
    return _RingAttention.apply(q, torch.stack((k, v)), boundaries, scale, kernels, group)
