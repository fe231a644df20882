"""torch's own fused operations, for CPU and CUDA. Signatures as in `kernels/reference.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from qwen3_npu.kernels import cpu_attention, reference


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, dropout: float) -> torch.Tensor:
    """One causal block, [s, b, n, d] with queries at the end of the keys."""
    if cpu_attention.serves(q, k, dropout):
        return cpu_attention.causal_attention(q, k, v, scale)
    s, t = q.shape[0], k.shape[0]
    mask = None
    if 1 < s < t:  # SDPA's is_causal would align queries with the first keys
        mask = torch.ones(s, t, dtype=torch.bool, device=q.device).tril(t - s)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=s == t, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.permute(2, 0, 1, 3)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    cu_seqlens: Sequence[int] | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Scaled dot product attention; packed documents one after the other, so memory grows with tokens, not squares."""
    if cu_seqlens is None:
        return _sdpa(q, k, v, scale, dropout=dropout)
    lengths = _lengths(cu_seqlens)
    documents = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_sdpa(*document, scale, dropout=dropout) for document in documents])


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    *,
    lengths: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """Scaled dot product attention, the query heads of one key head as its queries: keys are read once."""
    mask = None if visible is None else visible[:, None, None]
    k, v = (x[:, :, : max(lengths)] for x in (k, v))
    out = F.scaled_dot_product_attention(q.unflatten(1, (k.shape[1], -1)), k, v, attn_mask=mask, scale=scale)
    return out.flatten(1, 2)


def attention_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, cu_seqlens: Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A block by the CPU's flash attention; on other devices the reference, whose scores are block-sized."""
    if q.device.type != "cpu":
        return reference.attention_block(q, k, v, scale=scale, cu_seqlens=cu_seqlens)
    results = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, is_causal=causal, scale=scale)
        for *heads, causal in _documents(q, k, v, cu_seqlens)
    ]
    out = torch.cat([out.permute(2, 0, 1, 3) for out, _ in results])
    return out, torch.cat([lse.permute(2, 0, 1) for _, lse in results])


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
    if q.device.type != "cpu":
        return reference.attention_block_backward(grad, q, k, v, out=out, lse=lse, scale=scale, cu_seqlens=cu_seqlens)
    groups = k.shape[2]
    parts = []
    lengths = _lengths(cu_seqlens) or [q.shape[0]]
    saved = zip(*(x.split(lengths) for x in (grad, out, lse)), strict=True)
    for (*heads, causal), (d, o, total) in zip(_documents(q, k, v, cu_seqlens), saved, strict=True):
        parts.append(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                d.permute(1, 2, 0, 3), *heads, o.permute(1, 2, 0, 3), total.permute(1, 2, 0), 0.0, causal, scale=scale
            )
        )
    dq, dk, dv = (torch.cat([part[i].permute(2, 0, 1, 3) for part in parts]) for i in range(3))
    dk, dv = (x.unflatten(2, (groups, -1)).sum(3) for x in (dk, dv))
    return dq, dk, dv


def _lengths(cu_seqlens: Sequence[int] | None) -> list[int] | None:
    return None if cu_seqlens is None else [end - start for start, end in itertools.pairwise(cu_seqlens)]


def _documents(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: Sequence[int] | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]]:
    """q, k, v of each document as [b, n, s, d], key/value heads repeated; and whether attention is causal."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    lengths = _lengths(cu_seqlens)
    parts = [(q, k, v)] if lengths is None else zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    for document in parts:
        queries, keys, values = (x.permute(1, 2, 0, 3) for x in document)
        yield queries, keys, values, lengths is not None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """torch's rms_norm."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A sum and torch's rms_norm of it."""
    total = residual + x
    return rms_norm(total, weight, eps), total


class _Rotary(torch.autograd.Function):
    """Rotation in one pass; its gradient is the rotation back, so only cos and sin are kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    # Both halves of cos are the same, and of sin.
    cos, sin = cos[..., :half], sin[..., :half]
    first, second = x[..., :half], x[..., half:]
    out = torch.empty_like(x)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding without temporaries of x's size."""
    return _Rotary.apply(x, cos, sin)


class _Swiglu(torch.autograd.Function):
    """Keeps only its input; the gradient recomputes the sigmoid."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        d_gate, d_up = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return out


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """SwiGLU that keeps one tensor for backward instead of three."""
    return _Swiglu.apply(x)


def weighted_swiglu(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`swiglu`, and a multiplication."""
    return (swiglu(x) * weights.unsqueeze(-1)).to(x.dtype)


def prepared_linear(weight: torch.Tensor, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """On a CPU a copy of the weight in oneDNN's blocked layout, which is fast for few rows."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return reference.prepared_linear(weight, rows)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
