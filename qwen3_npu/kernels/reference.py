"""The definition of correct: each operation in readable torch. Slow and memory hungry on purpose.

s = sequence (queries), t = sequence (keys), b = batch, n = query heads, g = key/value heads, d = head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    cu_seqlens: Sequence[int] | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Causal attention with grouped key/value heads.

    Args:
        q: [s, b, n, d].
        k, v: [t, b, g, d], n a multiple of g. With t > s the queries are the last s positions (decoding).
        scale: factor on q k^T.
        cu_seqlens: borders of the documents packed in the sequence, [0, ..., s]; needs b = 1 and t = s. A token sees
            only its own document.
        dropout: probability of dropping an attention weight, from the current generator.

    Returns:
        [s, b, n, d].
    """
    s, t = q.shape[0], k.shape[0]
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k).float() * scale
    visible = torch.arange(t, device=q.device) <= torch.arange(t - s, t, device=q.device)[:, None]
    if cu_seqlens is not None:
        document = torch.zeros(s, dtype=torch.long, device=q.device)
        document[list(cu_seqlens[1:-1])] = 1
        document = document.cumsum(0)
        visible = visible & (document[:, None] == document)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1).to(q.dtype)
    weights = torch.nn.functional.dropout(weights, dropout)
    return torch.einsum("bnst,tbnd->sbnd", weights, v)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 (as transformers' Qwen3RMSNorm)."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding on whole heads, first half against second half (as transformers' rotate_half).

    Args:
        x: [s, b, n, d].
        cos, sin: [s, 1 or b, 1, d], of x's dtype.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where gate is the first half of the last dimension and up the second: [..., 2f] -> [..., f]."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def grouped_matmul(x: torch.Tensor, weight: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Consecutive rows of x times the matrix of their group.

    Args:
        x: [rows, k], rows sorted by group.
        weight: [groups, k, n].
        counts: rows of each group; they add up to x's rows.

    Returns:
        [rows, n].
    """
    return torch.cat([part @ matrix for part, matrix in zip(x.split(list(counts)), weight, strict=True)])
