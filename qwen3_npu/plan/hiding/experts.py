"""Exposed seconds of the exchange of experts, in closed form (`model/expert_parallel/overlap.py`).

All pieces are sent at once; each one is computed on arrival and sent back. The first piece's way there is exposed, and
the last one's way back except for later computing (in backward the gradients of its weights). If exchanges take longer
than products, the difference is exposed, too. `trace` plays the real program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

# What a pass computes until it lets the other one go on, and the seconds of the exchange that is under way then.
Turns = Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class ExpertLayer:
    """Seconds of a layer in a micro-batch.

    Attributes:
        attended, routed, experts, summed: forward computing: until the attention is done, until tokens are sent to
            experts, until their results are sent back, and of the sum of the results.
        backward: seconds of the backward pass over those of the forward pass.
        there, back: what nothing in its own pass hides of the exchanges of a forward, and of a backward pass.
        moved: of all exchanges one way.
    """

    attended: float
    routed: float
    experts: float
    summed: float
    backward: float
    there: float
    back: float
    moved: float

    def by_turns(self, number: int, *, is_recomputed: bool) -> float:
        """Seconds that nothing hides, of a forward and a backward pass of so many layers by turns."""
        own, second, there, back = [], [], self.there / 2, self.back / 2
        first, last = self.attended + self.routed, 0.0
        for layer in range(number):
            before = self.summed if layer else 0.0  # of the layer before
            if is_recomputed:  # the forward pass lets a backward pass go on that exchanges twice as often
                own += [(before + self.attended, 0.0), (self.routed, there)]
                own += [(2 / 3 * self.experts, 0.0), (self.experts / 3, there)]
                second += [(last + first, there), (self.experts, there), ((1 + self.backward) * self.summed, back)]
            else:
                own += [(before + first, there), (self.experts, there)]
                second += [(last + self.backward * self.summed, back)]
            second += [(self.backward * self.experts, back)]
            last = self.backward * first
        own, second = [*own, (self.summed, 0.0)], [*second, (last, 0.0)]
        computed = sum(seconds for seconds, _ in (*own, *second))
        return max(exposed_by_turns(own, second), number * self.moved * (6 if is_recomputed else 4) - computed)


def exposed_by_turns(own: Turns, second: Turns) -> float:
    """Seconds in which neither of two passes computes (`distributed/turns.py`). The second one begins.

    All exchanges take one way, one after the other.
    """
    turns, number, ends = (own, second), [0, 0], [0.0, 0.0]
    now = free = exposed = 0.0
    side = 1
    while number[0] < len(own) or number[1] < len(second):
        if number[side] == len(turns[side]):
            side = 1 - side
        computed, exchange = turns[side][number[side]]
        idle = max(0.0, ends[side] - now)
        exposed, now = exposed + idle, now + idle + computed
        if exchange:
            ends[side] = free = max(now, free) + exchange
        number[side] += 1
        side = 1 - side
    return exposed + max(0.0, max(ends) - now)


def seconds_left(piece: float, products: float, pieces: int, *, behind: float = 0.0) -> float:
    """Exposed seconds of an exchange in both directions.

    Args:
        piece: seconds to send one piece.
        products: seconds of the products of all pieces.
        behind: seconds of work of all pieces after their results were sent.
    """
    last = max(0.0, piece - behind / pieces)
    return max(piece + last, 2 * pieces * piece - products - behind)
