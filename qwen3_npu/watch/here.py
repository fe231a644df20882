"""The position of this rank, as the training reports it. Without a watcher this does nothing; with one it takes
microseconds.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

from qwen3_npu.watch.state import PHASES, State
from qwen3_npu.watch.times import Times

T = TypeVar("T")
_states: list[State | Times] = []  # what notes this process's position
_NUMBERS = {name: number for number, name in enumerate(PHASES)}


def watch(*states: State | Times) -> None:
    """Use these objects to record the rank's position from now on."""
    _states[:] = states


def at(phase: str) -> None:
    """Enter a phase of a step, unless a `during` is active."""
    for state in _states:
        if not state.held:
            state.enter_phase(_NUMBERS[phase])


@contextlib.contextmanager
def during(phase: str) -> Iterator[None]:
    """Be in this phase inside the context, whatever is called there."""
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
    """A function that enters this phase and then calls the given function."""

    @functools.wraps(function)
    def noted(*args: object, **kwargs: object) -> T:
        at(phase)
        return function(*args, **kwargs)

    return noted


def times() -> Times | None:
    """The recorder of times, or None."""
    return next((state for state in _states if isinstance(state, Times)), None)


def step_done(step: int) -> None:
    """The step with this number (from 1) is done."""
    for state in _states:
        state.finish_step(step)
