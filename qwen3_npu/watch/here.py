"""The position of this rank, as the training reports it. Without a watcher this does nothing; with one it takes
microseconds.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

from qwen3_npu.watch.state import PHASES, State

T = TypeVar("T")
_states: list[State] = []  # of this process: none, or one
_NUMBERS = {name: number for number, name in enumerate(PHASES)}


def watch(state: State | None) -> None:
    """From now on write to this state; None: to none."""
    _states[:] = [] if state is None else [state]


def at(phase: str) -> None:
    """This rank is now in this phase of a step, unless it is in a `during`."""
    if _states and not _states[0].held:
        _states[0].enter_phase(_NUMBERS[phase])


@contextlib.contextmanager
def during(phase: str) -> Iterator[None]:
    """In this phase, whatever is called inside."""
    at(phase)
    for state in _states:
        state.held = True
    try:
        yield
    finally:
        for state in _states:
            state.held = False
        at("other")


def in_phase(phase: str, function: Callable[..., T]) -> Callable[..., T]:
    """The function, which puts the rank into this phase."""

    @functools.wraps(function)
    def noted(*args: object, **kwargs: object) -> T:
        at(phase)
        return function(*args, **kwargs)

    return noted


def step_done(step: int) -> None:
    """The step with this number (from 1) is done."""
    if _states:
        _states[0].finish_step(step)
