"""The queue between HTTP threads and the computing thread: orders go in, pieces of answers come out."""

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
    """One requested answer. It has plain values only, since it is sent to the other processes.

    Attributes:
        key: unique name.
        number: index of the answer in its request; the random numbers depend on it and on the seed.
        limit: maximum number of tokens to generate.
        stops: texts that end the answer.
        top: number of likeliest tokens to return beside each chosen one.
    """

    key: int
    number: int
    tokens: list[int]
    limit: int
    sampling: Sampling
    stops: tuple[str, ...]
    top: int


class Piece(NamedTuple):
    """A piece of an answer.

    Attributes:
        text: may be shorter than the tokens' text, which is held back until a character or a stop text is certain.
        likeliest: for each token the likeliest ones at its position with their log-probabilities.
        finish: reason of the answer's end, see `Request`; "" while it continues.
    """

    text: str = ""
    tokens: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    likeliest: Sequence[list[tuple[int, float]]] = ()
    finish: str = ""


class News(NamedTuple):
    """Events since the last call of `Desk.take`.

    Attributes:
        dropped: keys of orders whose clients have left.
        ends: the server stops when it is idle.
        cuts: the server stops immediately.
    """

    orders: list[Order]
    dropped: list[int]
    ends: bool
    cuts: bool


Inbox = queue.SimpleQueue[tuple[int, Piece]]  # pieces, and which order they are of


class Desk:
    """Thread-safe; `stop` may also be called in a signal handler.

    Attributes:
        inboxes: key of an incomplete order -> queue of its pieces.
        ended: the computing thread has ended; nothing is answered any more.
    """

    def __init__(self) -> None:
        self.inboxes: dict[int, Inbox] = {}
        self.ended = False
        self._events: queue.SimpleQueue[Order | int | None] = queue.SimpleQueue()
        self._keys = itertools.count()
        self._stops: list[float] = []

    # Threads that serve HTTP

    @property
    def closed(self) -> bool:
        """Whether no more orders are accepted."""
        return self.ended or bool(self._stops)

    def new_key(self) -> int:
        """A unique key for an order."""
        return next(self._keys)

    def hand_in(self, order: Order, inbox: Inbox) -> None:
        """Submit an order."""
        self.inboxes[order.key] = inbox
        self._events.put(order)

    def leave(self, key: int) -> None:
        """The client no longer waits: drop the order if it is incomplete."""
        if self.inboxes.pop(key, None) is not None:
            self._events.put(key)

    def stop(self) -> None:
        """Accept no more orders; the second call gives up the present ones."""
        now = time.monotonic()
        if not self._stops or now - self._stops[-1] > _SAME_SIGNAL:
            self._stops.append(now)
            self._events.put(None)

    # The thread that computes

    def take(self, *, wait: bool) -> News | None:
        """The news, if there are any. Args: wait: wait a moment if there are none."""
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
        """Deliver a piece, if its client still waits."""
        if (inbox := self.inboxes.get(key)) is not None:
            inbox.put((key, piece))
            if piece.finish:
                self.inboxes.pop(key, None)

    def end(self) -> None:
        """The computing thread ends: tell all waiting clients."""
        self.ended = True
        for key in list(self.inboxes):
            self.put(key, Piece(finish=CUT))
