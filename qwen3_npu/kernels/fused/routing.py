"""Copy tokens to their experts and sum the results, without waiting of the host and without atomic additions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from qwen3_npu.kernels.fused.rows import power_of_two

_BLOCK = 1024


class Places(NamedTuple):
    """Where the copies are.

    Attributes:
        tokens: [rows] int32, the token of each copy.
        rows: [tokens, experts of a token] int32, the copies of each token.
    """

    tokens: torch.Tensor
    rows: torch.Tensor


@triton.jit
def _place(
    chosen, ends, probs, tokens_of, rows_of, weights, tokens,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    token, expert = tl.program_id(0), tl.arange(0, BLOCK)
    here = tl.load(chosen + token * EXPERTS + expert, mask=expert < EXPERTS, other=0).to(tl.int32)
    row = tl.load(ends + expert * tokens + token, mask=expert < EXPERTS, other=0) - 1
    rank = tl.cumsum(here, 0) - 1
    mask = (here != 0) & (rank < TOP)
    tl.store(tokens_of + row, tl.zeros((BLOCK,), tl.int32) + token, mask=mask)
    tl.store(rows_of + token * TOP + rank, row, mask=mask)
    tl.store(weights + row, tl.load(probs + token * EXPERTS + expert, mask=mask, other=0.0), mask=mask)


@triton.jit
def _weights_back(dweights, chosen, ends, dprobs, tokens, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    token, expert = tl.program_id(0), tl.arange(0, BLOCK)
    inside = expert < EXPERTS
    here = tl.load(chosen + token * EXPERTS + expert, mask=inside, other=0).to(tl.int32)
    row = tl.load(ends + expert * tokens + token, mask=inside, other=0) - 1
    found = tl.load(dweights + row, mask=inside & (here != 0), other=0.0)
    tl.store(dprobs + token * EXPERTS + expert, found, mask=inside)


@triton.jit
def _gather(x, index, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(index + row).to(tl.int64)
    tl.store(out + row * SIZE + column, tl.load(x + source * SIZE + column, mask=column < SIZE), mask=column < SIZE)


@triton.jit
def _add_up(x, index, out, SIZE: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(TOP):
        source = tl.load(index + row * TOP + i).to(tl.int64)
        total += tl.load(x + source * SIZE + column, mask=column < SIZE, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + column, total, mask=column < SIZE)


def _columns(x: torch.Tensor) -> tuple[int, dict[str, int]]:
    block = min(_BLOCK, power_of_two(x.shape[1]))
    return triton.cdiv(x.shape[1], block), {"SIZE": x.shape[1], "BLOCK": block}


def gather_rows(x: torch.Tensor, places: Places) -> torch.Tensor:
    """[tokens, n] -> [rows, n]."""
    blocks, shape = _columns(x)
    out = x.new_empty(len(places.tokens), x.shape[1])
    _gather[(len(out), blocks)](x.contiguous(), places.tokens, out, **shape)
    return out


def add_up(x: torch.Tensor, places: Places) -> torch.Tensor:
    """[rows, n] -> [tokens, n], added in float32 in the order of the experts."""
    blocks, shape = _columns(x)
    out = x.new_empty(len(places.rows), x.shape[1])
    _add_up[(len(out), blocks)](x.contiguous(), places.rows, out, TOP=places.rows.shape[1], **shape)
    return out


class Permute(torch.autograd.Function):
    """As `reference.permute`; its third and fourth results are the fields of `Places`."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor, rows: int) -> tuple:
        count, experts = routing_map.shape
        chosen, probs = routing_map.contiguous(), probs.contiguous()
        # One scan over all choices, expert by expert: where each copy goes, plus one.
        ends = chosen.t().contiguous().view(-1).cumsum(0, dtype=torch.int32)
        places = Places(ends.new_empty(rows), ends.new_empty(count, rows // count))
        weights = probs.new_empty(rows)
        _place[(count,)](
            chosen.view(torch.uint8), ends, probs, places.tokens, rows_of=places.rows, weights=weights, tokens=count,
            EXPERTS=experts, BLOCK=power_of_two(experts), TOP=rows // count,
        )  # fmt: skip
        ctx.save_for_backward(chosen, ends, *places)
        ctx.mark_non_differentiable(*places)
        return gather_rows(tokens, places), weights, *places

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, dweights: torch.Tensor, *_: object) -> tuple:
        chosen, ends, *places = ctx.saved_tensors
        count, experts = chosen.shape
        dprobs = dweights.new_empty(count, experts)
        _weights_back[(count,)](
            dweights.contiguous(), chosen.view(torch.uint8), ends, dprobs,
            tokens=count, EXPERTS=experts, BLOCK=power_of_two(experts),
        )  # fmt: skip
        return add_up(grad, Places(*places)), None, dprobs, None


class Unpermute(torch.autograd.Function):
    """As `reference.unpermute`."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, places: Places) -> torch.Tensor:
        ctx.save_for_backward(*places)
        return add_up(rows, places)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        return gather_rows(grad, Places(*ctx.saved_tensors)), None
