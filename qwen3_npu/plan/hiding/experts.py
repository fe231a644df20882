"""How much of the exchange of experts their products leave, in closed form (`model/expert_parallel/overlap.py`).

All pieces set out at once; each is computed when it has arrived, and sets out back. Nothing hides the first piece's way
there, nor the last one's way back but for what is computed behind it (in backward the gradients of its weights); if
exchanges take longer than products, what is longer is left, too. `trace` plays the real program.
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
    """Seconds that nothing hides, of an exchange there and back.

    Args:
        piece: seconds of one piece's way.
        products: of all pieces, that results wait for.
        behind: of all pieces, computed when a piece's results have set out.
    """
    last = max(0.0, piece - behind / pieces)
    return max(piece + last, 2 * pieces * piece - products - behind)
