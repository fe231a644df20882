"""All ranks skip the optimizer step together when a number is not finite."""

from __future__ import annotations

from qwen3_npu import log
from qwen3_npu.errors import Stopped


class NanGuard:
    """Counts skipped optimizer steps; ends the run when too many come in a row.

    Args:
        limit: number of consecutive skipped steps that are tolerated.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.in_a_row, self.total = limit, 0, 0

    def count(self, skipped: bool) -> None:
        """Count whether this step's update was skipped, because a loss or gradient was not finite on any rank."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.total += skipped

    def report(self, iteration: int, loss: float, grad_norm: float, samples: range, *, why: str | None = None) -> None:
        """Log a skipped update. Args: why: reason of a spike. Raises: Stopped: too many updates were skipped."""
        limit = f" ({why})" if why is not None and "above" in why else ""
        log.info(
            f"warning: step {iteration}: update skipped: loss {loss:g}, grad norm {grad_norm:g}{limit}; samples "
            f"{samples.start} to {samples.stop - 1}; {self.in_a_row} in a row, {self.total} in all"
        )
        if self.in_a_row > self.limit:
            raise Stopped(
                f"step {iteration}: {self.in_a_row} updates in a row were skipped, above --max-skipped-updates "
                f"{self.limit}; the weights are those of step {iteration - self.in_a_row}; lower --lr, or look at the "
                f"samples named above"
            )
