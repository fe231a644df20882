"""Experts whose exchange is hidden by their products (--moe-alltoall-overlap-comm).

The exchange is divided into pieces by experts: each piece carries the rows of some experts of every rank, so a product
has all rows of its experts and each weight is used once. All pieces are sent at once. While one piece is computed, the
next ones travel, and its results are sent back immediately. Backward does the same, and computes the gradients of a
piece's weights after sending its rows. The way of the first piece there and of the last one back has no product of
these experts to hide behind; another micro-batch may hide it (--moe-fb-overlap). `forward` and `backward` here fix the
order of waits and operations: neither autograd nor another thread decides it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from qwen3_npu.distributed.turns import offer_turn, pass_turn
from qwen3_npu.kernels import Kernels
from qwen3_npu.model.expert_parallel.exchange import (
    Exchange,
    ExchangePiece,
    Launched,
    from_experts,
    from_experts_back,
    to_experts,
    to_experts_back,
)
from qwen3_npu.model.quantized import held, some_of

if TYPE_CHECKING:
    from qwen3_npu.model.experts import GroupedExperts


def overlapped(experts: GroupedExperts, rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """The experts' results for this rank's rows, in the order of the rows.

    Args:
        experts: its parameters must be sorted by expert in memory.
        rows: [rows, width and router weight], sorted by piece, rank and expert.
    """
    is_tracked = torch.is_grad_enabled() and (
        rows.requires_grad or any(weight.requires_grad for weight in experts.parameters())
    )
    names, weights = zip(*experts.named_parameters(recurse=False), strict=True)
    return _Overlapped.apply(rows, exchange, experts, names, is_tracked, *weights)


@dataclasses.dataclass
class _Later:
    """A weight gradient to be computed later: x^T grad of each expert, added to `total`."""

    weight: torch.Tensor
    x: torch.Tensor
    grad: torch.Tensor
    counts: torch.Tensor


class _PieceOfExperts:
    """Some of the experts as a separate module, whose parameters are views of the original memory."""

    def __init__(
        self,
        experts: GroupedExperts,
        piece: ExchangePiece,
        exchange: Exchange,
        later: list[_Later],
        *,
        is_tracked: bool,
    ) -> None:
        count, some = experts.num_local_experts, piece.experts
        self.counts = exchange.counts[some]
        self.weights: dict[str, torch.Tensor] = {}
        for name, parameter in experts.named_parameters(recurse=False):
            if held(parameter) is not None:
                self.weights[name] = some_of(parameter, some)
                continue
            weight = parameter.detach().view(count, -1)[some].detach()
            self.weights[name] = weight.requires_grad_(parameter.requires_grad and is_tracked)
        self.module = object.__new__(type(experts))
        self.module.__dict__.update(vars(experts))
        self.module.__dict__.update(
            _parameters=self.weights,
            kernels=_deferring(experts.kernels, later),
            offers_turn=False,
            **experts.state_of(some),
        )

    def __call__(self, tokens: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        out, _ = self.module.forward(tokens, self.counts, probs)
        return out


def _deferring(kernels: Kernels, later: list[_Later]) -> Kernels:
    """Kernels whose grouped product defers the gradients of parameters to `later`."""

    def grouped_matmul(counts: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        plain = kernels.grouped_matmul(counts)

        def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            leaf = weight if weight._base is None else weight._base
            if not (leaf.is_leaf and leaf.requires_grad):
                return plain(x, weight)  # frozen, or made of parameters by autograd
            return _Deferred.apply(x, weight, plain, counts, later)

        return product

    return dataclasses.replace(kernels, grouped_matmul=grouped_matmul)


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, plain: Callable, counts: torch.Tensor, later: list[_Later]
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.plain, ctx.counts, ctx.later = weight, plain, counts, later
        return plain(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        (x,) = ctx.saved_tensors
        grad = grad.contiguous()
        dx = ctx.plain(grad, ctx.weight.detach().transpose(1, 2)) if ctx.needs_input_grad[0] else None
        ctx.later.append(_Later(ctx.weight, x, grad, ctx.counts))
        return dx, None, None, None, None


class _Overlapped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        exchange: Exchange,
        experts: GroupedExperts,
        names: tuple[str, ...],
        is_tracked: bool,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        ctx.exchange, ctx.names, ctx.weights, ctx.kernels = exchange, names, weights, experts.kernels
        ctx.runs, pieces = [], exchange.pieces
        out = rows.new_empty(len(rows), exchange.width)
        places = list(zip(pieces, rows.split(_lengths(exchange)), out.split(_lengths(exchange)), strict=True))
        there = [Launched(part, (piece.sent, piece.received), exchange) for piece, part, _ in places]
        back = []
        pass_turn()
        for number, ((piece, _, place), launched) in enumerate(zip(places, there, strict=True)):
            if experts.offers_turn and number == len(places) // 2:
                offer_turn()
            run = _Run(experts, piece, exchange, is_tracked=is_tracked)
            result = run.forward(launched.arrived())
            back.append(Launched(result, (piece.received, piece.sent), exchange, out=place))
            ctx.runs += [run] if is_tracked else []
        pass_turn()
        for launched in back:
            launched.arrived()
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        exchange, totals = ctx.exchange, [_Total(weight, len(ctx.exchange.counts)) for weight in ctx.weights]
        there = [
            Launched(part, (run.piece.sent, run.piece.received), exchange)
            for run, part in zip(ctx.runs, grad.split(_lengths(exchange)), strict=True)
        ]
        rows = grad.new_empty(len(grad), exchange.width + ctx.runs[0].tail)
        back = []
        pass_turn()
        for run, launched, place in zip(ctx.runs, there, rows.split(_lengths(exchange)), strict=True):
            result = run.backward(launched.arrived())
            back.append(Launched(result, (run.piece.received, run.piece.sent), exchange, out=place))
            run.weight_gradients(ctx.kernels, dict(zip(ctx.names, totals, strict=True)))
        ctx.runs = []
        pass_turn()
        for launched in back:
            launched.arrived()
        return rows, None, None, None, None, *(total.gradient() for total in totals)


def _lengths(exchange: Exchange) -> list[int]:
    return [sum(piece.sent) for piece in exchange.pieces]


class _Run:
    """The computation of one piece, with the tensors that backward needs."""

    def __init__(self, experts: GroupedExperts, piece: ExchangePiece, exchange: Exchange, *, is_tracked: bool) -> None:
        self.piece, self.exchange, self.is_tracked = piece, exchange, is_tracked
        self.later: list[_Later] = []
        self.experts = _PieceOfExperts(experts, piece, exchange, self.later, is_tracked=is_tracked)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.tail = rows.shape[1] - self.exchange.width
        tokens, probs = to_experts(rows, self.piece, self.exchange)
        if not self.is_tracked:
            return from_experts(self.experts(tokens, probs), self.piece, self.exchange)
        self.inputs = tokens.requires_grad_(), probs.requires_grad_()
        with torch.enable_grad():
            out = self.experts(*self.inputs)
        # Of the result only its place in the graph is kept, as autograd does.
        self.edge = torch.autograd.graph.get_gradient_edge(out)
        return from_experts(out.detach(), self.piece, self.exchange)

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of the rows."""
        grad = from_experts_back(grad, self.piece, self.exchange)
        # Not `grad`: megatron's recomputation refuses it.
        torch.autograd.backward([self.edge], [grad])
        dx, dprobs = (x.grad for x in self.inputs)
        assert dx is not None
        assert dprobs is not None
        del self.edge, self.inputs
        return to_experts_back(dx, dprobs, self.piece, self.exchange)

    def weight_gradients(self, kernels: Kernels, totals: dict[str, _Total]) -> None:
        """Compute the gradients that products deferred to `later`, and those of weights with other uses."""
        some = self.piece.experts
        names = {id(weight): name for name, weight in self.experts.weights.items()}
        for late in self.later:
            weight = late.weight
            total = totals[names[id(weight if weight._base is None else weight._base)]].of(some)
            kernels.add_grouped_gradient(late.x, late.grad, late.counts, total.view(weight.shape))
        for name, weight in self.experts.weights.items():
            if weight.grad is not None:
                totals[name].of(some).add_(weight.grad)
        self.later.clear()


class _Total:
    """The sum to which a parameter's gradient is added: megatron's sum over the micro-batches, if there is one."""

    def __init__(self, parameter: torch.Tensor, experts: int) -> None:
        self.parameter, self.experts = parameter, experts
        self.total: torch.Tensor | None = getattr(parameter, "main_grad", None)
        self.is_megatrons = self.total is not None

    def of(self, some: slice) -> torch.Tensor:
        """The part of some experts, [experts, elements of one expert]."""
        if self.total is None:
            self.total = torch.zeros_like(self.parameter)
        return self.total.view(self.experts, -1)[some]

    def gradient(self) -> torch.Tensor | None:
        """The result for autograd: the gradient, or, if megatron's sum has it, an empty tensor, which it ignores."""
        if not (self.parameter.requires_grad and self.is_megatrons):
            return self.total if self.parameter.requires_grad else None
        vars(self.parameter)["grad_added_to_main_grad"] = True
        return torch.empty_like(self.parameter)
