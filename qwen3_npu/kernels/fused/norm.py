"""RMSNorm: one read and one write forward; backward in one pass, the weight's gradient summed over rows by block."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from qwen3_npu.kernels.fused.rows import as_rows, multiprocessors, power_of_two

_ELEMENTS = 4096  # of a block; rows that are shorter are taken together
LONGEST = 16384  # a longer row does not fit into the registers of a block


@triton.jit
def _rms_norm(
    x, weight, out, scales, rows, inner, outer_stride, inner_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < SIZE)[None, :]
    start = (row // inner) * outer_stride + (row % inner) * inner_stride
    values = tl.load(x + start[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1) / SIZE + eps)
    factor = tl.load(weight + column, mask=column < SIZE, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * SIZE + column[None, :], values * scale[:, None] * factor[None, :], mask=mask)
    tl.store(scales + row, scale, mask=row < rows)


@triton.jit
def _rms_norm_backward(
    grad, x, weight, scales, dx, dweight, rows, inner, grad_outer, grad_inner, x_outer, x_inner,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    factor = tl.load(weight + column, mask=column < SIZE, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0) * ROWS
    while first < rows:
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (column < SIZE)[None, :]
        outer, within = row // inner, row % inner
        scale = tl.load(scales + row, mask=row < rows, other=0.0)[:, None]
        source = x + (outer * x_outer + within * x_inner)[:, None] + column[None, :]
        normal = tl.load(source, mask=mask, other=0.0).to(tl.float32) * scale
        source = grad + (outer * grad_outer + within * grad_inner)[:, None] + column[None, :]
        above = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(above * normal, 0)
        above = above * factor[None, :]
        along = tl.sum(above * normal, 1)[:, None] / SIZE
        tl.store(dx + row[:, None] * SIZE + column[None, :], (above - normal * along) * scale, mask=mask)
        first += tl.num_programs(0) * ROWS
    tl.store(dweight + tl.program_id(0) * SIZE + column, total, mask=column < SIZE)


def _shape(size: int) -> dict[str, int]:
    block = power_of_two(size)
    return {"SIZE": size, "BLOCK": block, "ROWS": max(_ELEMENTS // block, 1), "num_warps": 8 if block > 512 else 4}


class FusedRMSNorm(torch.autograd.Function):
    """x [..., n] (any strides but the last), weight [n], eps."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows = as_rows(x)
        count = rows.shape[0] * rows.shape[1]
        shape = _shape(x.shape[-1])
        out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
        scales = torch.empty(count, dtype=torch.float32, device=x.device)
        _rms_norm[(triton.cdiv(count, shape["ROWS"]),)](
            rows, weight, out, scales,
            rows=count, inner=rows.shape[1], outer_stride=rows.stride(0), inner_stride=rows.stride(1), eps=eps, **shape,
        )  # fmt: skip
        ctx.save_for_backward(rows, weight, scales)
        ctx.weight = weight
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        x, weight, scales = ctx.saved_tensors
        above, count, shape = as_rows(grad), scales.numel(), _shape(x.shape[-1])
        if above.shape != x.shape:
            above = above.reshape(x.shape)
        programs = min(triton.cdiv(count, shape["ROWS"]), 4 * multiprocessors(x.device))
        dx = torch.empty(grad.shape, dtype=x.dtype, device=x.device)
        dweight = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
        _rms_norm_backward[(programs,)](
            above, x, weight, scales, dx=dx, dweight=dweight, rows=count, inner=x.shape[1],
            grad_outer=above.stride(0), grad_inner=above.stride(1), x_outer=x.stride(0), x_inner=x.stride(1), **shape,
        )  # fmt: skip
        return dx, _weight_gradient(ctx.weight, dweight) if ctx.needs_input_grad[1] else None, None


def _weight_gradient(weight: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """What autograd gets for a norm's weight: the sum of [programs, n] float32 parts, or if megatron's sum over the
    micro-batches takes them, in one operation, an empty tensor."""
    total = getattr(weight, "main_grad", None)
    if total is None or total.dtype != torch.float32:
        return parts.sum(0).to(weight.dtype)
    total.addmv_(parts.t(), _ones(len(parts), parts.device))
    vars(weight)["grad_added_to_main_grad"] = True  # megatron's mark
    return torch.empty_like(weight)


@functools.cache
def _ones(count: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.ones(count, device=device)
