"""Two computations of one process by turns: while one's communication is under way, the other one computes.

Each has a thread of its own, of which one runs at any time. Where the turn passes is written down in the computations
(`pass_turn`), never decided by the system: all ranks launch operations and collectives in the same order in every run.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

M = TypeVar("M")
W = TypeVar("W")


class Abandoned(BaseException):
    """Ends a computation whose partner has failed; nobody sees it."""


class _TwoSides:
    """Where two threads wait for each other; 0 is the process's own, 1 the second one.

    Args:
        keep: notes, for the second one or not, what both would change, and returns what puts it back.
    """

    def __init__(self, keep: Callable[[bool], Callable[[], None]]) -> None:
        self.keep = keep
        self.gates = threading.Semaphore(0), threading.Semaphore(0)
        self.is_done = [False, False]
        self.failure: BaseException | None = None
        self.second: threading.Thread | None = None

    @property
    def side(self) -> int:
        return int(threading.current_thread() is self.second)

    def hand_over(self) -> None:
        """Let the other side go on, until it hands over or is done."""
        side = self.side
        if self.is_done[1 - side]:
            return
        put_back = self.keep(bool(side))
        self.gates[1 - side].release()
        self.gates[side].acquire()
        if self.failure is not None:
            raise Abandoned
        put_back()

    def end(self, failure: BaseException | None) -> None:
        """This side is done."""
        self.failure = self.failure or failure
        self.is_done[self.side] = True
        self.gates[1 - self.side].release()


_running: list[_TwoSides] = []


def pass_turn() -> None:
    """Here communication is under way whose end is waited for next: the other computation may go on, if any."""
    if _running:
        _running[0].hand_over()


def offer_turn() -> None:
    """Here the process's own computation may pause, for a partner that communicates more often."""
    if _running and _running[0].side == 0:
        _running[0].hand_over()


def surroundings() -> contextlib.AbstractContextManager:
    """What the second thread takes over from the first one: called there, entered in the second."""
    return contextlib.nullcontext()


def by_turns(own: Callable[[], M], second: Callable[[], W], keep: Callable[[bool], Callable[[], None]]) -> tuple[M, W]:
    """Results of both. The second one begins, in a thread of its own, where autograd makes no further threads.

    Args:
        keep: see `_TwoSides`.

    Raises:
        BaseException: what one of them raised.
    """
    turns, device, results = _TwoSides(keep), torch.cuda.current_device(), list[W]()
    around = surroundings()

    def work() -> None:
        failure: BaseException | None = None
        turns.gates[1].acquire()
        try:
            if isinstance(device, int):
                torch.cuda.set_device(device)  # a thread's own
            with around, torch.autograd.set_multithreading_enabled(False):
                results.append(second())
        except BaseException as error:  # raised in the process's own thread
            failure = error
        turns.end(failure)

    turns.second = threading.Thread(target=work, name="second computation", daemon=True)
    turns.second.start()
    _running.append(turns)
    failure: BaseException | None = None
    try:
        turns.hand_over()
        result = own()
    except BaseException as error:
        failure = error
    put_back = keep(False)
    turns.end(failure)
    turns.second.join()
    put_back()
    _running.clear()
    if turns.failure is not None:
        raise turns.failure
    return result, results[0]
