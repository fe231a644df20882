"""NVIDIA GPUs: Triton kernels of ours (`kernels/fused`), torch's flash attention and grouped product.

Signatures as in `kernels/reference.py`. Operations that are not here are torch's own (`torch_native`). Inputs that a
kernel does not support (float32 for flash attention and the grouped product, sizes that are no multiple of 16 bytes)
are computed by torch_native or the reference; `log` says so once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from qwen3_npu.kernels import reference, tell_once, torch_native
from qwen3_npu.kernels.fused import grouped, norm, pointwise, routing
from qwen3_npu.kernels.fused.loss import CrossEntropy

_HALF = (torch.bfloat16, torch.float16)  # dtypes of flash attention
_ALIGNED = 8  # elements of 16 bits that make the 16 bytes of a bulk copy


def why_no_kernel(operation: str) -> str | None:
    """Why an operation's kernel cannot be used with this torch on this GPU; None if it can."""
    if operation != "grouped_matmul":
        return None
    if not hasattr(torch, "_grouped_mm"):
        return f"torch {torch.__version__} has no _grouped_mm (2.8 has)"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        return (
            f"torch has a grouped product from compute capability 9.0 on, and {torch.cuda.get_device_name()} is older"
        )
    return None


@functools.lru_cache(maxsize=16)
def _on_device(cu_seqlens: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Boundaries in the form of flash attention; one asynchronous copy per micro-batch."""
    with torch.inference_mode(False):
        host = torch.tensor(cu_seqlens, dtype=torch.int32)
        return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _longest(cu_seqlens: Sequence[int]) -> int:
    return max(end - start for start, end in itertools.pairwise(cu_seqlens))


def _flash_takes(q: torch.Tensor) -> bool:
    return q.device.type == "cuda" and q.dtype in _HALF and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


class _PackedAttention(torch.autograd.Function):
    """q [s, n, d], k and v [s, g, d] of several documents, each causal within itself."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: tuple[int, ...], options: dict[str, float]
    ) -> torch.Tensor:
        ends, longest = _on_device(bounds, q.device), _longest(bounds)
        out, lse, *state, _ = torch.ops.aten._flash_attention_forward(  # (seed, offset) or one tensor of both
            q, k, v, ends, ends, longest, longest, options["dropout"], True, False, scale=options["scale"]
        )
        ctx.save_for_backward(q, k, v, out, lse, ends, *state)
        ctx.longest, ctx.options = longest, options
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        *saved, ends, state, offset = ctx.saved_tensors
        longest, dropout = ctx.longest, ctx.options["dropout"]
        sizes = (ends, ends, longest, longest, dropout, True)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), *saved, *sizes, state, offset, scale=ctx.options["scale"]
        )
        return dq, dk, dv, None, None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    cu_seqlens: Sequence[int] | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Flash attention, of packed documents in one call."""
    if cu_seqlens is not None and len(cu_seqlens) == 2 and q.shape[0] == k.shape[0]:
        cu_seqlens = None  # one document
    if not _flash_takes(q):
        tell_once(f"attention without flash attention, which takes 16 bits and not {q.dtype} of {q.shape[-1]}")
        if q.shape[2] != k.shape[2]:  # torch's other kernels know no grouped heads
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
        return torch_native.attention(q, k, v, scale=scale, cu_seqlens=cu_seqlens, dropout=dropout)
    if cu_seqlens is None:
        return torch_native.attention(q, k, v, scale=scale, dropout=dropout)
    assert q.shape[1] == 1, "packed documents are one row"
    options = {"scale": scale, "dropout": dropout}
    return _PackedAttention.apply(*(x.squeeze(1) for x in (q, k, v)), tuple(cu_seqlens), options).unsqueeze(1)


def attention_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, cu_seqlens: Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A block of ring attention by flash attention, which returns the log-sum-exp."""
    if not _flash_takes(q):
        return reference.attention_block(q, k, v, scale=scale, cu_seqlens=cu_seqlens)
    sizes = _sizes(q, k, cu_seqlens)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        _rows(q), _rows(k), _rows(v), *sizes, 0.0, cu_seqlens is not None, False, scale=scale
    )
    return _unrows(out, q), lse.view(q.shape[2], q.shape[1], q.shape[0]).permute(2, 1, 0)


def attention_block_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    cu_seqlens: Sequence[int] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Its gradients."""
    if not _flash_takes(q):
        return reference.attention_block_backward(grad, q, k, v, out=out, lse=lse, scale=scale, cu_seqlens=cu_seqlens)
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the random state of dropout, which is not used
    grads = torch.ops.aten._flash_attention_backward(
        _rows(grad.to(q.dtype)), _rows(q), _rows(k), _rows(v), _rows(out.to(q.dtype)),
        lse.permute(2, 1, 0).flatten(1).contiguous(), *_sizes(q, k, cu_seqlens), 0.0, cu_seqlens is not None,
        state, torch.empty(0, dtype=torch.uint64, device=q.device), scale=scale,
    )  # fmt: skip
    dq, dk, dv = (_unrows(x, like) for x, like in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


def _sizes(
    q: torch.Tensor, k: torch.Tensor, cu_seqlens: Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Boundaries of queries and keys on the device, and the longest of each; every row of the batch is a document."""
    if cu_seqlens is not None and len(cu_seqlens) > 2:
        ends, longest = _on_device(tuple(cu_seqlens), q.device), _longest(cu_seqlens)
        return ends, ends, longest, longest
    bounds = (_on_device(tuple(n * i for i in range(q.shape[1] + 1)), q.device) for n in (q.shape[0], k.shape[0]))
    return next(bounds), next(bounds), q.shape[0], k.shape[0]


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[s, b, n, d] -> [b s, n, d]."""
    return x.transpose(0, 1).flatten(0, 1)


def _unrows(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The reverse."""
    return x.reshape(like.shape[1], like.shape[0], *like.shape[2:]).transpose(0, 1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Triton's."""
    if x.shape[-1] > norm.LONGEST or x.dim() < 2:
        return torch_native.rms_norm(x, weight, eps)
    return norm.FusedRMSNorm.apply(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A sum, and Triton's norm of it."""
    total = residual + x
    return rms_norm(total, weight, eps), total


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Triton's."""
    return pointwise.Rotary.apply(x, cos, sin)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """Triton's."""
    return pointwise.Swiglu.apply(x, None) if x.numel() else reference.swiglu(x)


def weighted_swiglu(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Triton's, weights and all."""
    return pointwise.Swiglu.apply(x, weights) if x.numel() else reference.weighted_swiglu(x, weights)


def grouped_matmul(counts: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """torch's grouped product; the ends of groups stay on the device; bfloat16 only."""
    device = counts.device
    if device.type == "cpu" and torch.cuda.is_available():  # with a capacity the counts are constants
        counts = counts.pin_memory().to("cuda", non_blocking=True)
    ends = counts.cumsum(0, dtype=torch.int32)

    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if not x.shape[0]:
            return x @ weight[0]  # no rows, but gradients of the right shape
        if x.dtype is not torch.bfloat16 or x.shape[1] % _ALIGNED or weight.shape[2] % _ALIGNED:
            tell_once(
                f"torch's grouped product takes bfloat16, sizes in steps of {_ALIGNED}: not {x.dtype} {weight.shape}"
            )
            return reference.grouped_matmul(counts)(x, weight)
        return _GroupedMatmul.apply(x, weight, ends)

    return product


def add_grouped_gradient(x: torch.Tensor, grad: torch.Tensor, counts: torch.Tensor, total: torch.Tensor) -> None:
    """Triton's, where the sum is float32."""
    if total.dtype is torch.float32:
        grouped.add_products(x, grad, total, counts.cumsum(0, dtype=torch.int32))
    else:
        reference.add_grouped_gradient(x, grad, counts, total)


class _GroupedMatmul(torch.autograd.Function):
    """torch's grouped product; a parameter's gradient goes straight into megatron's float32 sum of the micro-batches.

    `weight` may be a view of the parameter. torch's own gradient would be written in 16 bits and read again.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, ends)
        ctx.parameter = weight if weight._base is None else weight._base
        return torch._grouped_mm(x, weight, offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        x, weight, ends = ctx.saved_tensors
        grad, dx, dw = grad.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            dx = torch._grouped_mm(grad, weight.transpose(1, 2), offs=ends)
        if ctx.needs_input_grad[1]:
            total = getattr(ctx.parameter, "main_grad", None)
            if total is not None and total.dtype == torch.float32:
                grouped.add_products(x, grad, total.view(weight.shape), ends)
                vars(ctx.parameter)["grad_added_to_main_grad"] = True  # megatron's mark
                dw = torch.empty_like(weight)
            else:
                dw = torch._grouped_mm(x.t(), grad, offs=ends)
        return dx, dw, None


def add_weight_gradient(x: torch.Tensor, grad: torch.Tensor, total: torch.Tensor) -> None:
    """One product that adds to the sum, whose 16-bit factors are not converted first (torch 2.8 and newer)."""
    if x.dtype == total.dtype or x.device.type != "cuda":
        reference.add_weight_gradient(x, grad, total)
    elif _adds_in_float32(x.device, x.dtype):
        torch.addmm(total, grad.t(), x, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(grad.t(), x))


@functools.cache
def _adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds a product of 16-bit factors to a float32 matrix here: tried once."""
    x = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, x.t(), x, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        tell_once(f"weight gradients are rounded to 16 bits before they are added: torch.addmm: {reason}")
        return False
    return bool((total == 17).all())


def permute(
    tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor, routing.Places]:
    """Triton's; the host does not wait."""
    copies, weights, *places = routing.Permute.apply(tokens, routing_map, probs, rows)
    return copies, weights, routing.Places(*places)


def unpermute(rows: torch.Tensor, indices: routing.Places, tokens: int) -> torch.Tensor:
    """Triton's: copies are added in float32, always in the same order."""
    return routing.Unpermute.apply(rows, indices)


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup, vocab_size: int
) -> torch.Tensor:
    """Triton's; keeps the logits, in their own dtype, instead of a float32 softmax."""
    return CrossEntropy.apply(logits, labels, group, vocab_size)
