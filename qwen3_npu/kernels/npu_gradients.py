"""Operations of torch_npu with a gradient of our own, which launches and keeps less.

A weight's gradient is added directly to the buffer in which megatron sums the micro-batches (`main_grad`), as in
megatron's own fused linears: this saves the 16-bit gradient, its conversion and the addition, and nothing is rounded to
16 bits. Sources and checks are those of `kernels/npu.py`; never run on an NPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch_npu
from torch.utils.weak import WeakTensorKeyDictionary

_16_BIT = (torch.bfloat16, torch.float16)


def _accumulated(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The result for autograd: a weight's gradient, or an empty tensor, which megatron ignores, if it was added."""
    total = getattr(weight, "main_grad", None)
    if total is None:
        return gradient.to(weight.dtype)
    total.add_(gradient)
    return _is_added(weight)


def _is_added(weight: torch.Tensor) -> torch.Tensor:
    vars(weight)["grad_added_to_main_grad"] = True  # megatron's mark on its parameters
    return torch.empty_like(weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out, scale = torch_npu.npu_rms_norm(x, weight, epsilon=eps)
        ctx.save_for_backward(x, scale)
        ctx.weight = weight
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        x, scale = ctx.saved_tensors
        dx, dw = torch_npu.npu_rms_norm_backward(grad, x, ctx.weight, scale)
        return dx, _accumulated(ctx.weight, dw) if ctx.needs_input_grad[1] else None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """npu_rms_norm."""
    return _RMSNorm.apply(x, weight, eps)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, scale, total = torch_npu.npu_add_rms_norm(x, residual, weight, epsilon=eps)
        ctx.save_for_backward(total, scale)
        ctx.weight = weight
        return out, total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, grad_total: torch.Tensor) -> tuple:
        total, scale = ctx.saved_tensors
        dx, dw = torch_npu.npu_rms_norm_backward(grad, total, ctx.weight, scale)
        dx.add_(grad_total)
        return dx, dx, _accumulated(ctx.weight, dw) if ctx.needs_input_grad[2] else None, None


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """npu_add_rms_norm."""
    return _AddRMSNorm.apply(x, residual, weight, eps)


# sin of a micro-batch -> -sin, for all layers.
_NEGATED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class _RotaryMul(torch.autograd.Function):
    """The gradient is the rotation back: x is not kept, and no gradient of cos and sin is computed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if ctx.needs_input_grad[0]:
            if sin not in _NEGATED:
                _NEGATED[sin] = -sin
            ctx.save_for_backward(cos, _NEGATED[sin])
        return torch_npu.npu_rotary_mul(x, cos, sin, rotary_mode="half")

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        cos, back = ctx.saved_tensors
        return torch_npu.npu_rotary_mul(grad, cos, back, rotary_mode="half"), None, None


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """npu_rotary_mul, in its layout SBND with cos and sin [s, 1 or b, 1, d]."""
    return _RotaryMul.apply(x, cos, sin)


class GroupedMatmul(torch.autograd.Function):
    """torch_npu has no gradient for it. Groups are rows (m) here and in dx, the index summed over (k) in dw.

    `weight` may be a view of the parameter whose gradient is accumulated.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.parameter = weight if weight._base is None else weight._base
        return _grouped(x, weight, ends, group_type=0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        x, weight, ends = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _grouped(grad, weight.transpose(1, 2), ends, group_type=0)
        if ctx.needs_input_grad[1]:
            main = getattr(ctx.parameter, "main_grad", None)
            if main is not None and main.dtype == torch.float32 and x.dtype in _16_BIT:
                _add_products(main.view(weight.shape), x, grad, ends=ends)
                dw = _is_added(ctx.parameter).view(weight.shape)
            else:
                dw = _grouped(x.t(), grad, ends, group_type=2)
        return dx, dw, None


def add_grouped_gradient(x: torch.Tensor, grad: torch.Tensor, ends: torch.Tensor, total: torch.Tensor) -> None:
    """total [groups, k, n] += x^T grad of each group of rows, in place."""
    if total.dtype == torch.float32 and x.dtype in _16_BIT:
        _add_products(total, x, grad, ends=ends)
    else:
        total.add_(_grouped(x.t(), grad, ends, group_type=2))


def _grouped(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, *, group_type: int) -> torch.Tensor:
    return torch_npu.npu_grouped_matmul(
        [x], [weight], group_list=ends, split_item=3, group_type=group_type, group_list_type=0
    )[0]


def _add_products(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor, *, ends: torch.Tensor) -> None:
    """total [groups, k, n] float32 += x^T y of each group of rows; x [rows, k], y [rows, n] of 16 bits."""
    torch_npu.npu_grouped_matmul_add_(total, x, y, ends, transpose_x=True, transpose_weight=False, group_type=2)


@functools.lru_cache(maxsize=64)
def _one_group(rows: int, device: torch.device) -> torch.Tensor:
    return torch.full((1,), rows, dtype=torch.int64, device=device)


def add_weight_gradient(x: torch.Tensor, grad: torch.Tensor, total: torch.Tensor) -> None:
    """npu_grouped_matmul_add_ of one group. It takes 16-bit factors and a float32 sum; else addmm."""
    if total.dtype == torch.float32 and x.dtype in _16_BIT:
        _add_products(total.unsqueeze(0), grad, x, ends=_one_group(x.shape[0], x.device))
    else:
        total.addmm_(grad.t(), x)
