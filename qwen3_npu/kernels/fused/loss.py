"""Softmax of long rows of logits in one pass, and its gradient in another: no float32 copy of the logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl

_BLOCK = 2048


@triton.jit
def _statistics(
    logits, labels, largest, total, target, first, size, STRIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    values = logits + row * STRIDE
    most = tl.zeros((BLOCK,), tl.float32) - 3e38  # finite: the difference of two infinities is no number
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, STRIDE, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(values + column, mask=column < size, other=float("-inf")).to(tl.float32)
        more = tl.maximum(most, x)
        sums = sums * tl.exp(most - more) + tl.exp(x - more)
        most = more
    maximum = tl.max(most, 0)
    tl.store(largest + row, maximum)
    tl.store(total + row, tl.sum(sums * tl.exp(most - maximum), 0))
    label = tl.load(labels + row) - first
    here = (label >= 0) & (label < STRIDE)
    found = tl.load(values + label, mask=here & (label < size), other=float("-inf")).to(tl.float32)
    tl.store(target + row, tl.where(here, found - maximum, 0.0))


@triton.jit
def _gradient(
    logits, labels, lse, grad, out, first, size, STRIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * STRIDE + column, mask=column < size, other=float("-inf")).to(tl.float32)
    p = tl.exp(x - tl.load(lse + row)) - (column == tl.load(labels + row) - first).to(tl.float32)
    tl.store(out + row * STRIDE + column, p * tl.load(grad + row).to(tl.float32), mask=column < STRIDE)


class CrossEntropy(torch.autograd.Function):
    """logits [..., local vocabulary], labels [...] int64, group, words of the vocabulary -> [...] float32."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup, vocab_size: int
    ) -> torch.Tensor:
        logits, labels = logits.contiguous(), labels.contiguous()
        width = logits.shape[-1]
        first = group.rank() * width
        size = min(max(vocab_size - first, 0), width)
        largest, total, target = (
            torch.empty(labels.shape, dtype=torch.float32, device=logits.device) for _ in range(3)
        )
        _statistics[(labels.numel(),)](
            logits, labels, largest, total, target=target, first=first, size=size,
            STRIDE=width, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
        if group.size() > 1:
            most = largest.clone()
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
            is_here = (labels >= first) & (labels < first + width)
            moved = largest - most
            both = torch.stack((torch.where(is_here, target + moved, 0.0), total * moved.exp()))
            dist.all_reduce(both, group=group)
            (target, total), largest = both.unbind(), most
        log_total = total.log()
        ctx.save_for_backward(logits, labels, largest + log_total)
        ctx.place = first, size
        return log_total - target

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        logits, labels, lse = ctx.saved_tensors
        first, size = ctx.place
        out, width = torch.empty_like(logits), logits.shape[-1]
        _gradient[(labels.numel(), triton.cdiv(width, _BLOCK))](
            logits, labels, lse, grad.contiguous(), out=out, first=first, size=size,
            STRIDE=width, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
        return out, None, None, None
