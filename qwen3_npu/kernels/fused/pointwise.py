"""Rotary embedding and SwiGLU, each one read and one write, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qwen3_npu.kernels.fused.rows import power_of_two


@triton.jit
def _rotate(
    x, cos, sin, out, batch, heads, s_stride, b_stride, n_stride, cos_s, cos_b, sign,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    s, b = place // batch, place % batch
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (head < heads) & (column < HALF)
    angle = s * cos_s + b * cos_b + column  # both halves of cos are the same, and of sin
    c = tl.load(cos + angle, mask=column < HALF, other=0.0).to(tl.float32)
    d = tl.load(sin + angle, mask=column < HALF, other=0.0).to(tl.float32) * sign
    source = x + s * s_stride + b * b_stride + head * n_stride + column
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    target = out + (place * heads + head) * (2 * HALF) + column
    tl.store(target, first * c - second * d, mask=mask)
    tl.store(target + HALF, second * c + first * d, mask=mask)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    s, b, n, d = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rotate[(s * b,)](
        x, cos, sin, out, batch=b, heads=n, s_stride=x.stride(0), b_stride=x.stride(1), n_stride=x.stride(2),
        cos_s=cos.stride(0), cos_b=cos.stride(1) if cos.shape[1] > 1 else 0, sign=sign,
        HALF=d // 2, BLOCK=power_of_two(d // 2), HEADS=power_of_two(n), num_warps=4 if n * d <= 4096 else 8,
    )  # fmt: skip
    return out


class Rotary(torch.autograd.Function):
    """x [s, b, n, d] (any strides but the last), cos and sin [s, 1 or b, 1, d]; the gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1.0), None, None


@triton.jit
def _swiglu(x, weights, out, SIZE: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    factor = 1.0
    if WEIGHTED:
        factor = tl.load(weights + row).to(tl.float32)
    for start in range(0, SPAN, BLOCK):
        column = tl.program_id(1) * SPAN + start + tl.arange(0, BLOCK)
        mask = column < SIZE
        gate = tl.load(x + row * 2 * SIZE + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(x + row * 2 * SIZE + SIZE + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row * SIZE + column, gate * tl.sigmoid(gate) * up * factor, mask=mask)


@triton.jit
def _swiglu_backward(
    grad, x, weights, dx, dweights, SIZE: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    factor = 1.0
    if WEIGHTED:
        factor = tl.load(weights + row).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, SPAN, BLOCK):
        column = tl.program_id(1) * SPAN + start + tl.arange(0, BLOCK)
        mask = column < SIZE
        gate = tl.load(x + row * 2 * SIZE + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(x + row * 2 * SIZE + SIZE + column, mask=mask, other=0.0).to(tl.float32)
        above = tl.load(grad + row * SIZE + column, mask=mask, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        silu = gate * share
        total += above * silu * up
        above = above * factor
        tl.store(dx + row * 2 * SIZE + column, above * up * (share + silu * (1 - share)), mask=mask)
        tl.store(dx + row * 2 * SIZE + SIZE + column, above * silu, mask=mask)
    if WEIGHTED:
        tl.store(dweights + row, tl.sum(total, 0))


def _grid(x: torch.Tensor, weighted: bool) -> tuple[tuple[int, int], dict[str, int]]:
    """Programs, and what they take of a row; a weight's gradient needs the whole row in one program."""
    size = x.shape[-1] // 2
    block = min(1024, power_of_two(size))
    span = triton.cdiv(size, block) * block if weighted else block
    shape = {"SIZE": size, "SPAN": span, "BLOCK": block, "WEIGHTED": weighted, "num_warps": max(block // 256, 1)}
    return (x.numel() // x.shape[-1], triton.cdiv(size, span)), shape


class Swiglu(torch.autograd.Function):
    """x [..., 2f] and, if the rows are weighted, weights [...] -> [..., f] of x's dtype; only these are kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        x = x.contiguous()
        weights = None if weights is None else weights.contiguous()
        ctx.save_for_backward(x, weights)
        grid, shape = _grid(x, weights is not None)
        out = x.new_empty(*x.shape[:-1], shape["SIZE"])
        _swiglu[grid](x, weights, out, **shape)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        x, weights = ctx.saved_tensors
        grid, shape = _grid(x, weights is not None)
        dx, dweights = torch.empty_like(x), None if weights is None else torch.empty_like(weights)
        _swiglu_backward[grid](grad.contiguous(), x, weights, dx, dweights=dweights, **shape)
        return dx, dweights
