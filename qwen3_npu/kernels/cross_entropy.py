"""Cross-entropy over a vocabulary that is sharded across tensor-parallel ranks and may be padded."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[label], float32, without gathering the logits. Formula as in Megatron-LM (arXiv:1909.08053).

    The float32 copy of the logits becomes the softmax in place. Backward keeps only this tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup, vocab_size: int
    ) -> torch.Tensor:
        start = group.rank() * logits.shape[-1]
        exp = logits.float() if logits.dtype != torch.float32 else logits.clone()
        exp[..., max(vocab_size - start, 0) :] = float("-inf")  # padded rows stand for no token
        largest = exp.amax(dim=-1)
        if group.size() > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        exp.sub_(largest.unsqueeze(-1))
        local = labels - start
        elsewhere = (local < 0) | (local >= logits.shape[-1])
        index = local.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)  # an NPU's cores fill no int64 by a mask
        target = exp.gather(-1, index).squeeze(-1).masked_fill_(elsewhere, 0.0)
        total = exp.exp_().sum(dim=-1)
        if group.size() > 1:
            both = torch.stack((target, total))
            dist.all_reduce(both, group=group)
            target, total = both.unbind()
        exp.div_(total.unsqueeze(-1))
        ctx.save_for_backward(exp, index, elsewhere)
        ctx.dtype = logits.dtype
        return total.log() - target

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        softmax, index, elsewhere = ctx.saved_tensors
        # The saved softmax is used once, so it may become the gradient.
        here = torch.where(elsewhere, 0.0, -1.0).unsqueeze(-1)
        softmax.scatter_add_(-1, index, here).mul_(grad.unsqueeze(-1))
        return softmax.to(ctx.dtype), None, None, None


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup, vocab_size: int
) -> torch.Tensor:
    """Loss of each token.

    Args:
        logits: [s, b, local vocabulary].
        labels: [s, b] int64; out of range (e.g. -100) gives a finite loss that the caller masks.
        group: tensor-parallel group.
        vocab_size: words of the model; logits past it are padding.

    Returns:
        [s, b] float32.
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, group, vocab_size)
