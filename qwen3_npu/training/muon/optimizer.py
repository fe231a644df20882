"""torch's AdamW, whose matrices Muon updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from qwen3_npu.args.training import OptimizerArgs
from qwen3_npu.training.muon.matrices import LayerMatrix, update_of


class MuonAdamW(torch.optim.AdamW):
    """One optimizer, so that groups, learning rates, clipping and checkpoints are those of AdamW.

    A matrix has a momentum, `exp_avg`, and no second moment. Momentum and its use are torch.optim.Muon's.
    """

    matrices: Mapping[torch.Tensor, LayerMatrix]
    args: OptimizerArgs
    dtype: torch.dtype

    @classmethod
    def adopt(
        cls,
        made: torch.optim.Optimizer,
        matrices: Mapping[torch.Tensor, LayerMatrix],
        args: OptimizerArgs,
        dtype: torch.dtype,
    ) -> None:
        """Let Muon update these parameters of an AdamW that megatron has made. Args: dtype: of the iteration."""
        assert type(made) is torch.optim.AdamW
        made.__class__ = cls
        assert isinstance(made, cls)
        made.matrices, made.args, made.dtype = matrices, args, dtype

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """AdamW's step for the other parameters, Muon's for the matrices."""
        gradients = {matrix: matrix.grad for matrix in self.matrices}
        try:
            for matrix in gradients:
                matrix.grad = None
            super().step(closure)
        finally:
            for matrix, gradient in gradients.items():
                matrix.grad = gradient
        for group in self.param_groups:
            for parameter in group["params"]:
                if gradients.get(parameter) is not None:
                    self._update(parameter, group["lr"], group["weight_decay"])

    def _update(self, parameter: torch.Tensor, lr: float, weight_decay: float) -> None:
        state, gradient, args = self.state[parameter], parameter.grad, self.args
        assert gradient is not None
        state["step"] += 1
        momentum = state["exp_avg"].lerp_(gradient, 1 - args.muon_momentum)
        direction = gradient.lerp(momentum, args.muon_momentum) if args.muon_use_nesterov else momentum
        update = update_of(direction, self.matrices[parameter], args, self.dtype)
        parameter.mul_(1 - lr * weight_decay).add_(update, alpha=-lr)
