"""The reference implementation: each operation in readable torch. Slow and memory hungry on purpose.

s = sequence (queries), t = sequence (keys), b = batch, n = query heads, g = key/value heads, d = head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from qwen3_npu.kernels.cross_entropy import cross_entropy  # noqa: F401  an operation as the others


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
        cu_seqlens: boundaries of the documents packed in the sequence, [0, ..., s]; needs b = 1 and t = s. A token sees
            only its own document.
        dropout: probability of dropping an attention weight, from the current generator.

    Returns:
        [s, b, n, d].
    """
    s, t = q.shape[0], k.shape[0]
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k).float() * scale
    visible = _visible(s, t, cu_seqlens, q.device)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1).to(q.dtype)
    weights = torch.nn.functional.dropout(weights, dropout)
    return torch.einsum("bnst,tbnd->sbnd", weights, v)


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    *,
    lengths: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """Attention of one new token of each sequence over the keys and values kept of it. Without autograd.

    Args:
        q: [b, n, d].
        k, v: [b, g, capacity, d], n a multiple of g: whole slots of a cache.
        visible: [b, t] bool, t the largest of `lengths`, which keys a sequence has; None: all of t.
        lengths: the same as numbers on the host, keys of each sequence.
        scale: factor on q k^T.

    Returns:
        [b, n, d].
    """
    k, v = (x[:, :, : max(lengths)].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("bnd,bntd->bnt", q, k).float() * scale
    if visible is not None:
        scores = scores.masked_fill(~visible.unsqueeze(1), float("-inf"))
    return torch.einsum("bnt,bntd->bnd", scores.softmax(dim=-1).to(q.dtype), v)


def attention_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, cu_seqlens: Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block of a larger attention, to be merged with others by its log-sum-exp. Without autograd.

    Args:
        q: [s, b, n, d].
        k, v: [t, b, g, d].
        cu_seqlens: documents of a diagonal block (t = s): causal within each. None: every query sees every key.

    Returns:
        The normalised output [s, b, n, d], and the log-sum-exp of the scaled scores [s, b, n], float32.
    """
    _, v, scores = _block_scores(q, k, v, scale, cu_seqlens=cu_seqlens)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp()
    return torch.einsum("bnst,tbnd->sbnd", weights, v.float()).to(q.dtype), lse.permute(2, 0, 1)


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
    """Gradients of one block, given the merged `out` and `lse` of all blocks (arXiv:2205.14135, appendix B).

    Returns:
        Gradients of q, k and v in their shapes.
    """
    groups = k.shape[2]
    k_all, v_all, scores = _block_scores(q, k, v, scale, cu_seqlens=cu_seqlens)
    weights = (scores - lse.permute(1, 2, 0).unsqueeze(-1)).exp()
    grad, out = grad.float(), out.float()
    dv = torch.einsum("bnst,sbnd->tbnd", weights, grad)
    d_weights = torch.einsum("sbnd,tbnd->bnst", grad, v_all.float())
    delta = (grad * out).sum(-1).permute(1, 2, 0).unsqueeze(-1)
    d_scores = weights * (d_weights - delta) * scale
    dq = torch.einsum("bnst,tbnd->sbnd", d_scores, k_all.float())
    dk = torch.einsum("bnst,sbnd->tbnd", d_scores, q.float())
    dk, dv = (x.unflatten(2, (groups, -1)).sum(3) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _block_scores(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, cu_seqlens: Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """k and v for every query head, and the masked scores [b, n, s, t]."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k).float() * scale
    if cu_seqlens is not None:
        scores = scores.masked_fill(~_visible(q.shape[0], k.shape[0], cu_seqlens, q.device), float("-inf"))
    return k, v, scores


def _visible(s: int, t: int, cu_seqlens: Sequence[int] | None, device: torch.device) -> torch.Tensor:
    """[s, t] bool: which keys a query sees; queries are the last s positions."""
    visible = torch.arange(t, device=device) <= torch.arange(t - s, t, device=device)[:, None]
    if cu_seqlens is not None:
        document = torch.zeros(s, dtype=torch.long, device=device)
        document[list(cu_seqlens[1:-1])] = 1
        document = document.cumsum(0)
        visible = visible & (document[:, None] == document)
    return visible


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 (as transformers' Qwen3RMSNorm)."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of `residual + x`, and that sum."""
    total = residual + x
    return rms_norm(total, weight, eps), total


def add_weight_gradient(x: torch.Tensor, grad: torch.Tensor, total: torch.Tensor) -> None:
    """Add a linear's weight gradient to the sum of the micro-batches, in place.

    Args:
        x: [rows, in], what the linear multiplied.
        grad: [rows, out], gradient of its output.
        total: [out, in], usually float32, so that the gradient is not rounded to 16 bits.
    """
    total.addmm_(grad.t().to(total.dtype), x.to(total.dtype))


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


def weighted_swiglu(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`swiglu` of each row times the row's weight: x [rows, 2f], weights [rows] -> [rows, f] of x's dtype."""
    return (swiglu(x) * weights.unsqueeze(-1)).to(x.dtype)


def grouped_matmul(counts: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Consecutive rows times the matrix of their group, for any number of products with the same groups.

    Args:
        counts: [groups] int64, rows of each group; usually on the device. This implementation reads them on the host.

    Returns:
        x [rows, k], whose rows are sorted by group and as many as the counts add up to, and weight [groups, k, n]
        -> [rows, n].
    """
    rows: list[int] = counts.tolist()

    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.cat([part @ matrix for part, matrix in zip(x.split(rows), weight, strict=True)])

    return product


def add_grouped_gradient(x: torch.Tensor, grad: torch.Tensor, counts: torch.Tensor, total: torch.Tensor) -> None:
    """Add the weight gradients of a grouped product, in place.

    Args:
        x: [rows, k], what was multiplied; grad: [rows, n], gradient of the result.
        counts: [groups] int64, rows of each group.
        total: [groups, k, n].
    """
    rows: list[int] = counts.tolist()
    for left, right, group in zip(x.split(rows), grad.split(rows), total, strict=True):
        add_weight_gradient(right, left, group)


def prepared_linear(weight: torch.Tensor, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A linear without autograd. Its weight does not change any more, so its memory layout may be changed.

    Args:
        weight: [n, k].
        rows: usual number of rows of x; any number is computed correctly.

    Returns:
        x [..., k] -> x @ weight^T [..., n].
    """
    return functools.partial(torch.nn.functional.linear, weight=weight)


def permute(
    tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copy each token once for each of its experts; copies are sorted by expert, then by token.

    Args:
        tokens: [t, hidden].
        routing_map: [t, experts] bool; every token has the same number of experts.
        probs: [t, experts].
        rows: t times the experts of a token.

    Returns:
        Copies [rows, hidden], the router's weight of each [rows], and the indices for `unpermute`.
    """
    by_expert = routing_map.t().contiguous()
    numbers = torch.arange(len(tokens), device=tokens.device).expand(by_expert.shape)
    indices = numbers.masked_select(by_expert)
    return tokens.index_select(0, indices), probs.t().contiguous().masked_select(by_expert), indices


def unpermute(rows: torch.Tensor, indices: torch.Tensor, tokens: int) -> torch.Tensor:
    """Sum the copies of each token.

    Args:
        rows: [rows, hidden], in the order of `permute`.
        indices: from the same implementation's `permute`.
        tokens: t.

    Returns:
        [t, hidden].
    """
    return rows.new_zeros(tokens, rows.shape[1]).index_add(0, indices, rows)
