"""torch's AdamW with Muon for the matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from qwen3_npu.args.training import OptimizerArgs
from qwen3_npu.training.muon.matrices import LayerMatrix, update_of
from qwen3_npu.training.muon.shares import Share, Work, from_owner, to_owner


class MuonAdamW(torch.optim.AdamW):
    """One optimizer for both, so groups, learning rates, clipping and checkpoints are those of AdamW.

    A matrix has a momentum, `exp_avg`, and no second moment. Momentum and its use are torch.optim.Muon's.
    """

    matrices: Mapping[torch.Tensor, LayerMatrix]
    work: Work
    args: OptimizerArgs
    dtype: torch.dtype

    @classmethod
    def adopt(
        cls,
        made: torch.optim.Optimizer,
        matrices: Mapping[torch.Tensor, LayerMatrix],
        work: Work,
        *,
        args: OptimizerArgs,
        dtype: torch.dtype,
    ) -> None:
        """Let Muon update these parameters of an AdamW that megatron has made.

        Args:
            work: this rank's matrices.
            dtype: dtype of the iteration.
        """
        assert type(made) is torch.optim.AdamW
        made.__class__ = cls
        assert isinstance(made, cls)
        made.matrices, made.work, made.args, made.dtype = matrices, work, args, dtype

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """AdamW's step for the other parameters, Muon's for the matrices. Every data-parallel rank calls it."""
        gradients = {matrix: matrix.grad for matrix in self.matrices}
        try:
            for matrix in gradients:
                matrix.grad = None
            super().step(closure)
        finally:
            for matrix, gradient in gradients.items():
                matrix.grad = gradient
        rates = self._prepare()
        for share in self.work.whole:
            self._apply(share, update_of(self._direction(share), share.matrix, self.args), rates)
        for turn in self.work.rounds:
            group = self.work.group
            assert group is not None
            shares = [piece.share for piece in turn.values()]
            pieces = [self._direction(share) for share in shares if share is not None]
            own = to_owner(pieces, turn, group, torch.empty(0, dtype=self.dtype, device=self.work.device))
            if group.rank() in turn:
                own = update_of(own, turn[group.rank()].matrix, self.args)
            for held, update in zip(shares, from_owner(own, turn, group), strict=True):
                if held is not None:
                    self._apply(held, update, rates)

    def _prepare(self) -> dict[torch.Tensor, float]:
        """Update the momenta and decay the weights. Returns the learning rate of each."""
        rates = {}
        for group in self.param_groups:
            mains = [parameter for parameter in group["params"] if parameter in self.matrices]
            if not mains:
                continue
            rates.update(dict.fromkeys(mains, group["lr"]))
            states = [self.state[main] for main in mains]
            torch._foreach_add_([state["step"] for state in states], 1)
            momenta = [state["exp_avg"] for state in states]
            torch._foreach_lerp_(momenta, [main.grad for main in mains], 1 - self.args.muon_momentum)
            torch._foreach_mul_(mains, 1 - group["lr"] * group["weight_decay"])
        return rates

    def _direction(self, share: Share) -> torch.Tensor:
        """The tensor that is made orthogonal, in the dtype of the iteration."""
        direction = share.of(self.state[share.main]["exp_avg"])
        if self.args.muon_use_nesterov:
            gradient = share.main.grad
            assert gradient is not None
            direction = share.of(gradient).lerp(direction, self.args.muon_momentum)
        return direction.to(self.dtype)

    def _apply(self, share: Share, update: torch.Tensor, rates: Mapping[torch.Tensor, float]) -> None:
        share.of(share.main).add_(update, alpha=-rates[share.main])
