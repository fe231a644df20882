"""DoRA (arXiv:2402.09353): each row of W + scale B A is scaled to a length, which is a trained parameter."""

from __future__ import annotations

import torch


class RowLengths:
    """Lengths of the rows of W + scale B A, computed without B A: |w|^2 + 2 s b A w + s^2 b A A^T b^T.

    W is frozen, so its squares are computed once.
    """

    def __init__(self, scale: float, group: torch.distributed.ProcessGroup | None) -> None:
        """Args: group: ranks that share each row; None: a rank has complete rows."""
        self.scale, self.group = scale, group
        self.squares: torch.Tensor | None = None
        self.parts: dict[int, RowLengths] = {}

    def of_part(self, some: slice) -> RowLengths:
        """The lengths of a part of W's first dimension; the division must always be the same."""
        return self.parts.setdefault(some.start, RowLengths(self.scale, self.group))

    @torch.no_grad()
    def __call__(self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """[.., out] float32, of W [.., out, in], A [.., r, in] and B [.., out, r]."""
        if self.squares is None:
            self.squares = torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32).square()
        mixed = ((weight @ a.transpose(-1, -2)).float() * b).sum(-1)
        own = (b.float() @ (a.float() @ a.float().transpose(-1, -2)) * b).sum(-1)
        total = self.squares + 2 * self.scale * mixed + self.scale**2 * own
        if self.group is not None and self.group.size() > 1:
            torch.distributed.all_reduce(total, group=self.group)
        return total.clamp(min=0).sqrt()
