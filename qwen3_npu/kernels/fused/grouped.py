"""Weight gradients of experts, added to their float32 sums where they are computed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE = 128
_ROWS = 64


@triton.jit
def _with_rows(
    product, x, y, start, last, in_k, in_n, k, n, x_stride, y_stride,
    ROWS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    row = (start + tl.arange(0, ROWS)).to(tl.int64)
    inside = (row < last)[:, None]
    left = tl.load(x + row[:, None] * x_stride + in_k[None, :], mask=inside & (in_k < k)[None, :], other=0.0)
    right = tl.load(y + row[:, None] * y_stride + in_n[None, :], mask=inside & (in_n < n)[None, :], other=0.0)
    if INTERPRETED:  # the interpreter would multiply the bits of 16-bit numbers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(tl.trans(left), right, product, input_precision="ieee")


@triton.jit
def _add_products(
    x, y, total, ends, k, n, x_stride, y_stride,
    TILE_K: tl.constexpr, TILE_N: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    first = tl.load(ends + group - 1, mask=group > 0, other=0)
    last = tl.load(ends + group)
    if first < last:
        columns = tl.cdiv(n, TILE_N)
        in_k = (tl.program_id(0) // columns) * TILE_K + tl.arange(0, TILE_K)
        in_n = (tl.program_id(0) % columns) * TILE_N + tl.arange(0, TILE_N)
        product = tl.zeros((TILE_K, TILE_N), tl.float32)
        if not INTERPRETED:  # the compiler overlaps the loads of such a loop with products
            for start in range(first, last, ROWS):
                product = _with_rows(
                    product, x, y, start, last=last, in_k=in_k, in_n=in_n, k=k, n=n,
                    x_stride=x_stride, y_stride=y_stride, ROWS=ROWS, INTERPRETED=INTERPRETED,
                )  # fmt: skip
        else:  # the interpreter cannot begin a range at a loaded number
            while first < last:
                product = _with_rows(
                    product, x, y, first, last=last, in_k=in_k, in_n=in_n, k=k, n=n,
                    x_stride=x_stride, y_stride=y_stride, ROWS=ROWS, INTERPRETED=INTERPRETED,
                )  # fmt: skip
                first += ROWS
        place = total + (group.to(tl.int64) * k + in_k.to(tl.int64))[:, None] * n + in_n[None, :]
        mask = (in_k < k)[:, None] & (in_n < n)[None, :]
        tl.store(place, tl.load(place, mask=mask, other=0.0) + product, mask=mask)


def add_products(x: torch.Tensor, y: torch.Tensor, total: torch.Tensor, ends: torch.Tensor) -> None:
    """total [groups, k, n] float32 += x^T y of each group of rows, in place; nothing is rounded to 16 bits.

    Args:
        x: [rows, k]; y: [rows, n]; of one dtype.
        ends: [groups] int32, where each group of rows ends.
    """
    x, y = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, y))
    groups, k, n = total.shape
    _add_products[(triton.cdiv(k, _TILE) * triton.cdiv(n, _TILE), groups)](
        x, y, total, ends, k=k, n=n, x_stride=x.stride(0), y_stride=y.stride(0),
        TILE_K=_TILE, TILE_N=_TILE, ROWS=_ROWS, INTERPRETED=not x.is_cuda, num_warps=8, num_stages=3,
    )  # fmt: skip
