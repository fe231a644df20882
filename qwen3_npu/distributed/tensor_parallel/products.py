"""Products of tensor-parallel linears that hide their own communication, forward and backward.

Under sequence parallelism a rank has a part of the tokens. A column-parallel linear needs those of all ranks (gather
and product), a row-parallel one sums over the ranks and keeps its part (product and reduce-scatter); backward is the
reverse. There are two ways to overlap both: torch_npu's fused operations (MC2), or pieces: while piece i is multiplied,
piece i + 1 travels. Piece i holds the same rows of every rank, so a piece is one collective.

As in megatron's linears, only the rank's part of the input is kept, and backward gathers it again. This exchange starts
in the backward of the following linear (`Link`) and is hidden behind the operations between the two.

s = tokens, b = batch, n = TP; a rank's own tokens are s / n.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist

from qwen3_npu.kernels import tell_once
from qwen3_npu.model.modules import is_summed, weight_gradient


class FusedProducts(Protocol):
    """Operations that communicate while they multiply; `kernels/npu.py` has them."""

    def gather_product(
        self, x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup, *, keep: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [rows, in] of all ranks times weight [in, out]: [n rows, out], and if `keep` the gathered x."""

    def product_scatter(self, x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """x [n rows, in] times weight [in, out], summed over the ranks: this rank's [rows, out]."""


@dataclasses.dataclass(frozen=True)
class Overlap:
    """How linears hide their communication.

    Attributes:
        pieces: maximum number of pieces; it must divide the tokens.
        fused: operations of the device, for products that they support; None: pieces.
        add_weight_gradient: see `Kernels`.
    """

    pieces: int
    fused: FusedProducts | None
    add_weight_gradient: Callable

    def fused_for(self, x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup) -> FusedProducts | None:
        """The fused operations if they support x [.., in] times weight [in, out]."""
        if self.fused is None:
            return None
        if reason := why_not_fused(x, weight, group.size()):
            tell_once(f"products in {self.pieces} pieces where torch_npu's fused operations cannot serve: {reason}")
            return None
        return self.fused

    def pieces_of(self, rows: int) -> int:
        """The number of equal pieces for this number of rows."""
        return next(n for n in range(min(self.pieces, rows), 0, -1) if rows % n == 0)


def why_not_fused(x: torch.Tensor, weight: torch.Tensor, ranks: int) -> str | None:
    """Why the fused operations do not support x [.., in] times weight [in, out] by their documentation, or None."""
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        return f"they multiply numbers of 16 bits, not {x.dtype}"
    if ranks not in (2, 4, 8, 16):  # 16 on A3
        return f"they communicate between 2, 4, 8 or 16 devices, not {ranks}"
    if not 256 <= weight.shape[0] < 65535:
        return f"they sum over 256 to 65534 numbers, not {weight.shape[0]}"
    return None


class Link:
    """From a row-parallel linear back to the column-parallel one before it in the same layer and micro-batch."""

    def __init__(self) -> None:
        self._column: object = None

    def leave(self, column: object) -> None:
        """The column-parallel linear's node; only if its weight needs the gathered input."""
        self._column = column

    def take(self) -> object:
        column, self._column = self._column, None
        return column


class _Arriving:
    """x [rows, b, width] of all ranks, piece by piece: `whole` is [pieces, n, rows / pieces, b, width]."""

    def __init__(self, x: torch.Tensor, pieces: int, group: dist.ProcessGroup) -> None:
        self.group, self.works = group, list[dist.Work]()
        self.parts = x.contiguous().view(pieces, x.shape[0] // pieces, *x.shape[1:])
        self.whole = x.new_empty(pieces, group.size(), *self.parts.shape[1:])
        self.send()

    def send(self) -> None:
        """Send the next piece, if there is one."""
        if (number := len(self.works)) < len(self.parts):
            whole = self.whole[number].flatten(0, 1)
            self.works.append(dist.all_gather_into_tensor(whole, self.parts[number], group=self.group, async_op=True))

    def arrived(self, behind: Callable[[], None]) -> Iterator[torch.Tensor]:
        """Each piece, while the next one travels. `behind`: called while the last one does."""
        for number in range(len(self.parts)):
            self.send()
            if number == len(self.parts) - 1:
                behind()
            self.works[number].wait()
            yield self.whole[number]


def _multiply(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [n, rows, in] times weight [in, out], also where the rows of ranks lie apart: no copy is made."""
    return torch.bmm(x, weight.expand(len(x), *weight.shape), out=out)


def _gather_multiplied(
    arriving: _Arriving, weight: torch.Tensor, *, behind: Callable[[], None] = lambda: None
) -> torch.Tensor:
    """The gathered rows times weight [in, out]: [s, b, out]. `behind`: see `_Arriving.arrived`."""
    pieces, ranks, rows, batch, _ = arriving.whole.shape
    out = arriving.whole.new_empty(ranks, pieces, rows * batch, weight.shape[1])
    for number, piece in enumerate(arriving.arrived(behind)):
        _multiply(piece.flatten(1, 2), weight, out[:, number])
    return out.view(ranks * pieces * rows, batch, -1)


def _multiply_scattering(
    x: torch.Tensor, weight: torch.Tensor, overlap: Overlap, group: dist.ProcessGroup
) -> tuple[torch.Tensor, list[dist.Work]]:
    """x [s, b, in] times weight [in, out], summed over ranks: [s / n, b, out]; and what is to be waited for."""
    ranks, (tokens, batch, _) = group.size(), x.shape
    pieces = overlap.pieces_of(tokens // ranks)
    rows = tokens // ranks // pieces
    parts = x.reshape(ranks, pieces, rows * batch, -1)
    out, works = x.new_empty(pieces, rows, batch, weight.shape[1]), []
    for number in range(pieces):
        product = _multiply(parts[:, number], weight).view(ranks * rows, batch, -1)
        works.append(dist.reduce_scatter_tensor(out[number], product, group=group, async_op=True))
    return out.flatten(0, 1), works


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


class _GatheredProduct(torch.autograd.Function):
    """[s / n, b, in] gathered over the tokens, times W^T of a weight [out / n, in]."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, overlap: Overlap, group: dist.ProcessGroup, link: Link
    ) -> torch.Tensor:
        ctx.weight, ctx.overlap, ctx.group, ctx.again = weight, overlap, group, None
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(x)
            link.leave(ctx)
        if fused := overlap.fused_for(x, weight.t(), group):
            out, _ = fused.gather_product(x.flatten(0, 1), weight.t(), group, keep=False)
            return out.view(-1, x.shape[1], weight.shape[0])
        return _gather_multiplied(_Arriving(x, overlap.pieces_of(x.shape[0]), group), weight.t())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        weight, overlap, group = ctx.weight, ctx.overlap, ctx.group
        needs_weight, dw = ctx.needs_input_grad[1], None
        if needs_weight:
            _send_again(ctx)
        elif fused := overlap.fused_for(grad, weight, group):
            dx = fused.product_scatter(grad.reshape(-1, grad.shape[-1]), weight, group)
            return dx.view(-1, grad.shape[1], weight.shape[1]), None, None, None, None
        dx, works = _multiply_scattering(grad, weight, overlap, group)
        if needs_weight:
            (gathered,) = ctx.again.arrived(lambda: None)
            ctx.again = None  # the schedule keeps the graph until the next micro-batch has gone forward
            dw = _weight_gradient(ctx, gathered, grad)
        _wait(works)
        return dx, dw, None, None, None


def _weight_gradient(ctx: Any, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    rows_x, rows_dy = (rows.reshape(-1, rows.shape[-1]) for rows in (x, grad))
    return weight_gradient(ctx.weight, rows_x, rows_dy, ctx.overlap.add_weight_gradient)


def _send_again(column: Any) -> None:
    """Gather a column-parallel linear's input for the gradient of its weight, unless this has started already."""
    if column.again is None:
        (x,) = column.saved_tensors
        if x.untyped_storage().nbytes():  # a recomputed norm fills it later
            column.again = _Arriving(x, 1, column.group)


class _ScatteredProduct(torch.autograd.Function):
    """[s, b, in / n] times W^T of a weight [out, in / n], summed over the ranks, scattered over the tokens."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, overlap: Overlap, group: dist.ProcessGroup, link: Link
    ) -> torch.Tensor:
        ctx.weight, ctx.overlap, ctx.group, ctx.column = weight, overlap, group, link.take()
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(x)
        if fused := overlap.fused_for(x, weight.t(), group):
            out = fused.product_scatter(x.reshape(-1, x.shape[-1]), weight.t(), group)
            return out.view(-1, x.shape[1], weight.shape[0])
        out, works = _multiply_scattering(x, weight.t(), overlap, group)
        _wait(works)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        weight, overlap, group = ctx.weight, ctx.overlap, ctx.group
        (x,) = ctx.saved_tensors if ctx.needs_input_grad[1] else (None,)

        def next_gather() -> None:
            if ctx.column is not None:
                _send_again(ctx.column)
            ctx.column = None

        if fused := overlap.fused_for(grad, weight, group):
            dx, gathered = fused.gather_product(grad.flatten(0, 1), weight, group, keep=x is not None)
            dx = dx.view(-1, grad.shape[1], weight.shape[1])
            next_gather()
            return dx, None if x is None else _weight_gradient(ctx, x, gathered), None, None, None
        return *_backward_in_pieces(ctx, x, grad, next_gather), None, None, None


def _backward_in_pieces(
    ctx: Any, x: torch.Tensor | None, grad: torch.Tensor, behind: Callable[[], None]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of a row-parallel linear's input, and of its weight if there is x [s, b, in / n].

    All of the weight's gradient but the last piece's part is computed while that piece travels.
    """
    weight, overlap, ranks = ctx.weight, ctx.overlap, ctx.group.size()
    pieces = overlap.pieces_of(grad.shape[0])
    arriving = _Arriving(grad, pieces, ctx.group)
    if x is None:
        return _gather_multiplied(arriving, weight, behind=behind), None
    # In the order of the pieces, while the first one travels.
    ordered = x.view(ranks, pieces, grad.shape[0] // pieces, *x.shape[1:]).transpose(0, 1).contiguous()
    parts: list[torch.Tensor] = []

    def last_travels() -> None:
        behind()
        if pieces > 1:
            parts.append(_weight_gradient(ctx, ordered[:-1], arriving.whole[:-1]))

    dx = _gather_multiplied(arriving, weight, behind=last_travels)
    parts.append(_weight_gradient(ctx, ordered[-1], arriving.whole[-1]))
    if is_summed(weight, overlap.add_weight_gradient):
        return dx, parts[-1]
    return dx, functools.reduce(torch.add, parts)


class _SummedProduct(torch.autograd.Function):
    """[s, b, in / n] times W^T of a weight [out, in / n], summed over the ranks: without sequence parallelism."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, overlap: Overlap, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.weight, ctx.overlap = weight, overlap
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(x)
        pieces = overlap.pieces_of(x.shape[0])
        parts = x.reshape(pieces, -1, x.shape[-1])
        out, works = x.new_empty(*x.shape[:-1], weight.shape[0]), []
        for part, result in zip(parts, out.view(pieces, -1, weight.shape[0]), strict=True):
            torch.mm(part, weight.t(), out=result)
            works.append(dist.all_reduce(result, group=group, async_op=True))
        _wait(works)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        weight, dw = ctx.weight, None
        if ctx.needs_input_grad[1]:
            rows_x, rows_dy = (t.reshape(-1, t.shape[-1]) for t in (*ctx.saved_tensors, grad))
            dw = weight_gradient(weight, rows_x, rows_dy, ctx.overlap.add_weight_gradient)
        return grad @ weight, dw, None, None


def gathered_product(
    x: torch.Tensor, weight: torch.Tensor, overlap: Overlap, group: dist.ProcessGroup, *, link: Link
) -> torch.Tensor:
    """Column-parallel: x [s / n, b, in], weight [out / n, in] -> [s, b, out / n]."""
    out: torch.Tensor = _GatheredProduct.apply(x, weight, overlap, group, link)
    return out


def scattered_product(
    x: torch.Tensor, weight: torch.Tensor, overlap: Overlap, group: dist.ProcessGroup, *, link: Link
) -> torch.Tensor:
    """Row-parallel: x [s, b, in / n], weight [out, in / n] -> [s / n, b, out]."""
    out: torch.Tensor = _ScatteredProduct.apply(x, weight, overlap, group, link)
    return out


def summed_product(x: torch.Tensor, weight: torch.Tensor, overlap: Overlap, group: dist.ProcessGroup) -> torch.Tensor:
    """Row-parallel without sequence parallelism: x [s, b, in / n], weight [out, in / n] -> [s, b, out]."""
    out: torch.Tensor = _SummedProduct.apply(x, weight, overlap, group)
    return out
