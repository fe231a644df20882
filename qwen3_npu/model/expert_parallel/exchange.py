"""The exchange of tokens between the ranks that hold the experts.

A row that is sent is a copy of a token followed by its router weight, so one exchange carries both. Rows are sorted by
piece of the exchange, then by rank, then by expert. Received rows are sorted by expert.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import _gather_along_first_dim, _reduce_scatter_along_first_dim

from qwen3_npu.distributed.turns import pass_turn

_TAIL = 16  # bytes behind a token: a router weight of any dtype, and rows stay aligned for kernels


@dataclasses.dataclass(frozen=True)
class ExchangePiece:
    """The part of an exchange that concerns some experts of every rank.

    Attributes:
        experts: of each rank's own.
        sent, received: rows to and from each rank of the expert-parallel group.
        gathered: rows of each rank of the experts' tensor-parallel group.
        chunks: rows of each source and expert, [etp x ep, experts], in the order in which they arrive.
    """

    experts: slice
    sent: list[int]
    received: list[int]
    gathered: list[int]
    chunks: np.ndarray


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The exchange of the rows of one layer and micro-batch.

    Attributes:
        counts: rows of each of this rank's experts, [experts] int64 on the device.
        width: of a token.
        dtype: of the router weights.
        summed: dtype in which ranks that share an expert add up its results.
        group, tensor_group: ranks that share the experts, and that share one expert.
    """

    pieces: Sequence[ExchangePiece]
    counts: torch.Tensor
    width: int
    dtype: torch.dtype
    summed: torch.dtype
    group: dist.ProcessGroup
    tensor_group: dist.ProcessGroup


def expert_parts(experts: int, count: int) -> list[slice]:
    """A rank's experts in `count` parts, as equal as possible."""
    bounds = [experts * part // count for part in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def pieces_of(everyone: np.ndarray, rank: tuple[int, int], experts: slice, count: int) -> list[ExchangePiece]:
    """An exchange in `count` pieces, each with some of every rank's experts.

    Args:
        everyone: [ep, etp, all experts], rows that each rank sends to each expert.
        rank: this rank's number in both groups.
        experts: this rank's experts, among all.
    """
    mine = everyone[rank].reshape(len(everyone), -1)
    theirs = everyone[:, :, experts].swapaxes(0, 1)  # [etp, ep, experts]
    pieces = []
    for some in expert_parts(experts.stop - experts.start, count):
        chunks = theirs[:, :, some]
        per_rank = chunks.sum(2)
        pieces.append(
            ExchangePiece(
                some,
                sent=mine[:, some].sum(1).tolist(),
                received=per_rank[rank[1]].tolist(),
                gathered=per_rank.sum(1).tolist(),
                chunks=chunks.reshape(-1, some.stop - some.start),
            )
        )
    return pieces


def widened(tokens: torch.Tensor) -> torch.Tensor:
    """[t, width] -> [t, width + room for a router weight], the room uninitialized."""
    return _Widened.apply(tokens)


def with_weights(rows: torch.Tensor, weights: torch.Tensor, width: int) -> torch.Tensor:
    """Copies of widened tokens with each one's router weight [rows] behind it."""
    return _WithWeights.apply(rows, weights, width)


def dispatched(rows: torch.Tensor, exchange: Exchange) -> tuple[torch.Tensor, torch.Tensor]:
    """The input of this rank's experts, sorted by expert: tokens [r, width] and router weights [r]."""
    return _Dispatched.apply(rows, exchange)


def combined(out: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """The experts' results [r, width], sent back to the ranks of their tokens, in the order of those."""
    return _Combined.apply(out, exchange)


class Launched:
    """A running exchange; `arrived` waits for it, on the device's stream if there is one."""

    def __init__(
        self,
        rows: torch.Tensor,
        sizes: tuple[list[int], list[int]],
        exchange: Exchange,
        out: torch.Tensor | None = None,
    ) -> None:
        """Args: sizes: rows sent to and received from each rank; out: contiguous memory for the received rows."""
        sent, received = sizes
        self.rows = rows.contiguous()  # kept until it has arrived
        self.out = rows.new_empty(sum(received), rows.shape[1]) if out is None else out
        self.work = dist.all_to_all_single(self.out, self.rows, received, sent, group=exchange.group, async_op=True)

    def arrived(self) -> torch.Tensor:
        if self.work is not None:
            self.work.wait()
        del self.rows
        return self.out


def _meanwhile(launched: Launched) -> torch.Tensor:
    """What arrives; until then another micro-batch may be computed (--moe-fb-overlap)."""
    pass_turn()
    return launched.arrived()


def to_experts(rows: torch.Tensor, piece: ExchangePiece, exchange: Exchange) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and router weights, sorted by expert, from rows as they arrive from the ranks."""
    if len(piece.gathered) > 1:
        rows = _gather_along_first_dim(rows, exchange.tensor_group, piece.gathered)
    weights = _weights_in(rows, exchange.width, exchange.dtype)
    return _turned(rows[:, : exchange.width], piece.chunks), _turned(weights, piece.chunks)


def to_experts_back(dx: torch.Tensor, dweights: torch.Tensor, piece: ExchangePiece, exchange: Exchange) -> torch.Tensor:
    """The gradient of `to_experts`'s rows."""
    parts, chunks = [dx, dweights.to(exchange.dtype)], piece.chunks.T
    is_shared = len(piece.gathered) > 1
    if is_shared:
        # Each rank has a part of every expert, so gradients are summed. Weights that travel as bits cannot be summed.
        parts = [_scattered(_turned(part, chunks), piece, exchange) for part in parts]
    rows = dx.new_empty(len(parts[0]), exchange.width + _tail(dx))
    places = rows[:, : exchange.width], _weights_in(rows, exchange.width, exchange.dtype)
    for part, place in zip(parts, places, strict=True):
        if is_shared:
            place.copy_(part)
        else:
            _turned(part, chunks, out=place)
    return rows


def from_experts(out: torch.Tensor, piece: ExchangePiece, exchange: Exchange) -> torch.Tensor:
    """Results of the experts in the order in which their rows arrived, summed over ranks that share an expert."""
    out = _turned(out, piece.chunks.T)
    if len(piece.gathered) == 1:
        return out
    return _scattered(out.to(exchange.summed), piece, exchange).to(out.dtype)


def from_experts_back(grad: torch.Tensor, piece: ExchangePiece, exchange: Exchange) -> torch.Tensor:
    """The gradient of the experts' results."""
    if len(piece.gathered) > 1:
        grad = _gather_along_first_dim(grad, exchange.tensor_group, piece.gathered)
    return _turned(grad, piece.chunks)


def _scattered(rows: torch.Tensor, piece: ExchangePiece, exchange: Exchange) -> torch.Tensor:
    return _reduce_scatter_along_first_dim(rows, exchange.tensor_group, piece.gathered)


def _turned(rows: torch.Tensor, chunks: np.ndarray, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rows in [n, m] chunks, rearranged to [m, n] chunks; contiguous, or in `out`."""
    parts = rows.split(chunks.ravel().tolist())
    count = chunks.shape[1]
    order = [part for first in range(count) for part in parts[first::count]]
    return torch.cat(order) if out is None else torch.cat(order, out=out)


def _tail(rows: torch.Tensor) -> int:
    return _TAIL // rows.element_size()


def _weights_in(rows: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """The router weights behind the tokens, [rows], in place."""
    tail = rows[:, width:]
    return (tail if tail.dtype == dtype else tail.view(dtype))[:, 0]


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor) -> torch.Tensor:
        ctx.width = tokens.shape[1]
        out = tokens.new_empty(len(tokens), ctx.width + _tail(tokens))
        out[:, : ctx.width].copy_(tokens)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad[:, : ctx.width]


class _WithWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor, width: int) -> torch.Tensor:
        ctx.width, ctx.dtype = width, weights.dtype
        _weights_in(rows, width, weights.dtype).copy_(weights)
        ctx.mark_dirty(rows)
        return rows

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return grad, _weights_in(grad, ctx.width, ctx.dtype).contiguous(), None


class _Dispatched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, exchange: Exchange) -> tuple[torch.Tensor, torch.Tensor]:
        (piece,) = exchange.pieces
        ctx.exchange = exchange
        return to_experts(_meanwhile(Launched(rows, (piece.sent, piece.received), exchange)), piece, exchange)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor, dweights: torch.Tensor) -> tuple[torch.Tensor, None]:
        (piece,) = ctx.exchange.pieces
        rows = to_experts_back(dx, dweights, piece, ctx.exchange)
        return _meanwhile(Launched(rows, (piece.received, piece.sent), ctx.exchange)), None


class _Combined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        (piece,) = exchange.pieces
        ctx.exchange = exchange
        return _meanwhile(Launched(from_experts(out, piece, exchange), (piece.received, piece.sent), exchange))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (piece,) = ctx.exchange.pieces
        grad = _meanwhile(Launched(grad, (piece.sent, piece.received), ctx.exchange))
        return from_experts_back(grad, piece, ctx.exchange), None
