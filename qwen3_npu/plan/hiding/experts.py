"""Exposed seconds of the exchange of experts, in closed form (`model/expert_parallel/overlap.py`).

All pieces are sent at once; each one is computed on arrival and sent back. The first piece's way there is exposed, and
the last one's way back except for later computing (in backward the gradients of its weights). If exchanges take longer
than products, the difference is exposed, too. `trace` plays the real program.
"""

from __future__ import annotations


def left_by_turns(exchange: float, busy: float, alone: int, passes: int) -> float:
    """Seconds that nothing hides of a micro-batch's exchanges, where passes of two are interleaved.

    Args:
        exchange, busy: of all layers, forward and back: under way, and computing.
        alone: passes at the start, and as many at the end, that have no other one beside them.
        passes: of a step.
    """
    share = min(1.0, alone / passes)
    return share * exchange + (1 - share) * max(0.0, exchange - busy)


def seconds_left(piece: float, products: float, pieces: int, *, behind: float = 0.0) -> float:
    """Exposed seconds of an exchange in both directions.

    Args:
        piece: seconds to send one piece.
        products: seconds of the products of all pieces.
        behind: seconds of work of all pieces after their results were sent.
    """
    last = max(0.0, piece - behind / pieces)
    return max(piece + last, 2 * pieces * piece - products - behind)
