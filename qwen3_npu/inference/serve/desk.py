"""Between the threads that speak HTTP and the one that computes: orders go in, pieces of answers come out."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Sequence
from typing import NamedTuple

from qwen3_npu.inference.sampling import Sampling

MOST = 1024  # orders that wait or run; more are refused
GRACE = 25  # seconds in which running answers may end once the server is to stop; torchrun kills after 30
_HEARTBEAT = 1.0  # seconds between two looks at a desk without news: a collective must not wait for long
_SAME_SIGNAL = 1.0  # seconds; under torchrun a process gets Ctrl-C from the terminal and from torchrun
CUT, DROPPED = "cut", "dropped"


class Order(NamedTuple):
    """One answer that is asked for; plain values, for it travels to the other processes.

    Attributes:
        key: names it.
        number: of the answer among those of one request; the random numbers depend on it and on the seed.
        limit: tokens to generate at most.
        stops: texts that end the answer.
        top: likeliest tokens wanted beside each chosen one.
    """

    key: int
    number: int
    tokens: list[int]
    limit: int
    sampling: Sampling
    stops: tuple[str, ...]
    top: int


class Piece(NamedTuple):
    """What an answer grew by.

    Attributes:
        text: may be shorter than the tokens' text, which can be held back until a character or a stop text is certain.
        likeliest: of each token, the likeliest ones in its place with their log-probabilities.
        finish: why the answer ended, see `Request`; "" while more comes.
    """

    text: str = ""
    tokens: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    likeliest: Sequence[list[tuple[int, float]]] = ()
    finish: str = ""


class News(NamedTuple):
    """What happened since the last look.

    Attributes:
        dropped: keys of orders that nobody waits for any more.
        ends: the server stops once it is idle.
        cuts: it does not wait for that.
    """

    orders: list[Order]
    dropped: list[int]
    ends: bool
    cuts: bool


Inbox = queue.SimpleQueue[tuple[int, Piece]]  # pieces, and which order they are of


class Desk:
    """Safe to use in threads; `stop` also in a signal handler.

    Attributes:
        inboxes: where the pieces of each order go that was not completed yet.
        ended: the computing thread has left; nothing is answered any more.
    """

    def __init__(self) -> None:
        self.inboxes: dict[int, Inbox] = {}
        self.ended = False
        self._events: queue.SimpleQueue[Order | int | None] = queue.SimpleQueue()
        self._keys = itertools.count()
        self._stops: list[float] = []

    # Threads that speak HTTP

    @property
    def closed(self) -> bool:
        """Whether no more orders are taken."""
        return self.ended or bool(self._stops)

    def new_key(self) -> int:
        """A name for an order."""
        return next(self._keys)

    def hand_in(self, order: Order, inbox: Inbox) -> None:
        """Ask for an answer."""
        self.inboxes[order.key] = inbox
        self._events.put(order)

    def leave(self, key: int) -> None:
        """Nobody waits for its answer any more, if it did not come."""
        if self.inboxes.pop(key, None) is not None:
            self._events.put(key)

    def stop(self) -> None:
        """Take no more orders; if called again, give up those that are there."""
        now = time.monotonic()
        if not self._stops or now - self._stops[-1] > _SAME_SIGNAL:
            self._stops.append(now)
            self._events.put(None)

    # The thread that computes

    def take(self, *, wait: bool) -> News | None:
        """The news, if there are any. Args: wait: for a moment, if there are none."""
        events: list[Order | int | None] = []
        try:
            events.append(self._events.get(timeout=_HEARTBEAT) if wait else self._events.get_nowait())
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            pass
        if not events and not self._stops:
            return None
        late = len(self._stops) > 1 or (bool(self._stops) and time.monotonic() - self._stops[0] > GRACE)
        return News(
            [event for event in events if isinstance(event, Order)],
            [event for event in events if isinstance(event, int)],
            bool(self._stops),
            late,
        )

    def put(self, key: int, piece: Piece) -> None:
        """Hand out a piece, if somebody waits for it."""
        if (inbox := self.inboxes.get(key)) is not None:
            inbox.put((key, piece))
            if piece.finish:
                self.inboxes.pop(key, None)

    def end(self) -> None:
        """Nothing is computed any more: who still waits is told."""
        self.ended = True
        for key in list(self.inboxes):
            self.put(key, Piece(finish=CUT))
