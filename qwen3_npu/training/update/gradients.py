"""Gradients between backward and the update: reduce, measure, divide and clip them.

Gradients are sums over the supervised tokens of the global batch. Dividing them by the number of tokens and clipping
them are one factor, which the optimizer's own pass applies if it can, so that no other pass writes them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer.optimizer import MegatronOptimizer

from qwen3_npu.checkpoint.training.optimizer_state import parts

# Where torch's fused AdamW divides gradients by `grad_scale`. torch_npu's takes that argument and ignores it.
_DIVIDES = ("cpu", "cuda")


class Gradients:
    """The gradients of an optimizer's weights in one step.

    Attributes:
        tokens: divisor of the sums, a scalar on the device; None if they are means already.
    """

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        self.optimizer = optimizer
        self.tokens: torch.Tensor | None = None

    def finalize(
        self, chunks: list[DistributedDataParallel], num_tokens: torch.Tensor | None = None, **options: object
    ) -> None:
        """Replacement of megatron's finalize_model_grads, which reads the number of tokens on the host and divides in a
        separate pass; this one only stores the number."""
        finalize_model_grads(chunks, None, **options)
        self.tokens = None
        if num_tokens is None:
            return
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(num_tokens, src=last, group=parallel_state.get_pipeline_model_parallel_group())
        dist.all_reduce(num_tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        self.tokens = num_tokens.clamp(min=1).float().view(())

    def measure(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of all gradients, and their remaining divisor: float32 scalars on the device.

        The norm is what megatron's `get_grad_norm` computes, which reads the norm of each parameter on the host.
        """
        found: dict[dist.ProcessGroup, list[torch.Tensor]] = {}
        for part in parts(self.optimizer):
            found.setdefault(part.get_grad_stats_parallel_group(), []).extend(part.get_main_grads_for_grad_norm())
        divisor = torch.ones((), device=device) if self.tokens is None else self.tokens
        total = torch.zeros((), device=device)
        for group, gradients in found.items():
            squares = torch.zeros_like(total)
            if gradients:
                squares = (torch.stack(torch._foreach_norm(gradients)) / divisor).square().sum()
            dist.all_reduce(squares, group=group)
            total += squares
        return total.sqrt(), divisor

    def update(self, norm: float, divisor: float) -> None:
        """Update the weights. Gradients are divided, and clipped so that their norm is at most --clip-grad.

        Args:
            norm, divisor: from `measure`.
        """
        for part in parts(self.optimizer):
            most = part.config.clip_grad / (norm + 1e-6)  # as megatron computes it; 0: no limit
            _divide(part, divisor / most if 0 < most < 1 else divisor)
        self.optimizer.step_with_ready_grads()


def _divide(part: MegatronOptimizer, divisor: float) -> None:
    """Divide the gradients now, or in the optimizer's next step."""
    optimizer, sliced = part.optimizer, vars(part).get("sliced")
    if sliced is not None:
        gradients = list(sliced.gradients.values())
    else:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return
    device = gradients[0].device
    # A derived class (Muon's) updates some weights without this division.
    if type(optimizer) is torch.optim.AdamW and device.type in _DIVIDES:
        scale = None if divisor == 1 else torch.full((), divisor, dtype=torch.float32, device=device)
        vars(optimizer)["grad_scale"] = scale  # torch's AdamW reads this attribute, which its own GradScaler sets
    elif divisor != 1:
        torch._foreach_mul_(gradients, 1 / divisor)
