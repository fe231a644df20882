"""Copies on other streams than the first are late: they are made when something waits for them, and no sooner.

So a wait that is missing shows in the numbers, and device memory that was given back too early has other contents then.
Everything else is done when its call returns.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch_npu

_queues: dict[int, collections.deque[Callable[[], object]]] = {}
_made: collections.Counter[int] = collections.Counter()  # stream -> copies that were asked for


def _current() -> int:
    stream = torch_npu.npu.current_stream()
    return 0 if stream == torch_npu.npu.default_stream() else stream.npu_stream


def delayed(to: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> bool:
    """Whether a copy between host and device waits in its stream's queue now; else it is to be made at once."""
    plain = to.is_contiguous() and source.is_contiguous() and to.dtype == source.dtype and to.shape == source.shape
    stream = _current() if non_blocking and plain and to.device.type != source.device.type else 0
    on_host, on_device = (source, to) if to.device.type == "npu" else (to, source)
    if not stream or not on_host.is_pinned():
        return False
    places, held = (to.data_ptr(), source.data_ptr(), to.nbytes), weakref.ref(on_device.untyped_storage())

    def copy() -> None:
        storage, address = held(), on_device_address
        is_there = storage is not None and storage.data_ptr() <= address < storage.data_ptr() + storage.nbytes()
        if is_there:
            ctypes.memmove(*places)
        elif on_host is not source:  # read from memory that somebody else may have
            on_host.fill_(torch.nan if on_host.is_floating_point() else -1)

    on_device_address = on_device.data_ptr()
    del on_device
    _queues.setdefault(stream, collections.deque()).append(copy)
    _made[stream] += 1
    return True


def catch_up() -> None:
    """What comes next in this stream comes after its copies."""
    if any(_queues.values()):
        _run(_current())


def _run(stream: int, until: int | None = None) -> None:
    queue = _queues.get(stream, ())
    done = _made[stream] - len(queue)
    for _ in range(len(queue) if until is None else until - done):
        queue.popleft()()


def install() -> None:
    """Follow events and waits."""
    event, stream = torch_npu.npu.Event, torch_npu.npu.Stream

    def run_event(which: Any) -> None:
        recorded = vars(which).get("recorded")
        if recorded is not None:
            _run(*recorded)

    def first(owner: Any, name: str, then: Callable[..., object]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **options: Any) -> Any:
            then(*args, **options)
            return original(*args, **options)

        setattr(owner, name, wrapped)

    def record(which: Any, on: Any = None) -> None:
        number = _current() if on is None else 0 if on == torch_npu.npu.default_stream() else on.npu_stream
        vars(which)["recorded"] = number, _made[number]

    first(event, "record", record)
    for name in ("wait", "synchronize"):
        first(event, name, lambda which, *_: run_event(which))
    first(stream, "synchronize", lambda which: _run(which.npu_stream))
    first(torch_npu.npu, "synchronize", lambda *_: [_run(number) for number in _queues])
    torch.npu.synchronize = torch_npu.npu.synchronize
