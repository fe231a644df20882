"""Copies of streams are as late as the program's waits allow; what the program does not order has the other order.

The first stream computes when it is asked to. A copy of another stream between pinned memory and the device is made
when something waits for it, after all that other streams may do before. A copy to the host in the first stream can be
read after a wait of the host. Memory that is given back is used again by the stream that owns it, as soon as that may
be: a copy of it that is not made by then is an error. So is a copy in a stream that has not waited for what the first
stream does with that memory. So a missing wait shows as an error or in the numbers.
"""

from __future__ import annotations

import bisect
import collections
import ctypes
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch_npu

_FIRST = 0
Place = tuple[int, int]  # address, bytes


@dataclasses.dataclass
class _Entry:
    """One thing in a stream's queue: a copy, or a wait for the first `until` entries of another stream."""

    run: Callable[[], object] | None = None
    stream: int = 0
    until: int = 0
    memory: Place = (0, 0)  # of the device
    keeps: object = None
    is_made: bool = False


_queues: dict[int, collections.deque[_Entry]] = collections.defaultdict(collections.deque)
_made: collections.Counter[int] = collections.Counter()  # stream -> entries that were asked for
_clock = [0]  # operations of the first stream
_seen: collections.Counter[int] = collections.Counter()  # stream -> operations of the first one that it comes after
_used: dict[int, int] = {}  # where memory starts -> the last operation of the first stream that used it
_races: list[str] = []
_places: dict[int, Place] = {}  # storage -> its memory, of those that are copied
_owners: list[tuple[int, int, int]] = []  # address, end, stream: what torch_npu has allocated


def _number(stream: Any) -> int:
    return _FIRST if stream == torch_npu.npu.default_stream() else stream.npu_stream


def _current() -> int:
    return _number(torch_npu.npu.current_stream())


def _place(tensor: torch.Tensor) -> Place:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _add(stream: int, entry: _Entry) -> None:
    _queues[stream].append(entry)
    _made[stream] += 1


def delayed(to: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> bool:
    """Whether a copy between host and device waits in its stream's queue now; else it is to be made at once."""
    plain = to.is_contiguous() and source.is_contiguous() and to.dtype == source.dtype and to.shape == source.shape
    on_host, on_device = (source, to) if to.device.type == "npu" else (to, source)
    if to.device.type == source.device.type:
        return False
    stream, size = _current(), to.nbytes
    if not (non_blocking and plain and on_host.is_pinned()):
        _run(stream)  # the host waits for it
        return False
    if stream == _FIRST:
        if on_host is source:
            _run(_FIRST)
            return False
        read = ctypes.string_at(source.data_ptr(), size)
        ctypes.memset(to.data_ptr(), 0xFF, size)
        _add(_FIRST, _Entry(functools.partial(_put, to, read)))
        return True
    place = _place(on_device)
    if _used.get(place[0], 0) > _seen[stream]:
        raise RuntimeError("a copy in a stream that has not waited for what the first one does with that memory")
    _follow(on_device.untyped_storage())
    places = to.data_ptr(), source.data_ptr(), size
    # Memory of the host stays until its copy is made, as torch_npu sees to.
    _add(stream, _Entry(functools.partial(_move, on_host, places), memory=place))
    return True


def _put(to: torch.Tensor, content: bytes) -> None:
    ctypes.memmove(to.data_ptr(), content, len(content))


def _move(on_host: torch.Tensor, places: tuple[int, int, int]) -> None:
    del on_host
    ctypes.memmove(*places)


def _follow(storage: torch.UntypedStorage) -> None:
    """Know when the memory of this storage is given back."""
    if storage._cdata not in _places:
        weakref.finalize(storage, _given_back, storage._cdata).atexit = False
    _places[storage._cdata] = storage.data_ptr(), storage.nbytes()


def _given_back(of: int) -> None:
    """The stream that owns this memory may use it again."""
    start, size = _places.pop(of)
    copies = [e for queue in _queues.values() for e in queue if start < sum(e.memory) and e.memory[0] < start + size]
    if not copies:
        return
    owner = _owner(start)
    if owner == _FIRST:
        _used_again(copies)
    else:
        _add(owner, _Entry(functools.partial(_used_again, copies)))


def _used_again(copies: list[_Entry]) -> None:
    """Args: copies: of memory that another operation has from now on."""
    if not all(copy.is_made for copy in copies):
        _races.append("memory is given back to a stream that has not waited for a copy of it")


def _owner(address: int) -> int:
    for again in (False, True):
        if again:
            segments = torch_npu.npu.memory_snapshot()
            _owners[:] = sorted((s["address"], s["address"] + s["total_size"], s["stream"]) for s in segments)
        at = bisect.bisect(_owners, (address, 1 << 62)) - 1
        if at >= 0 and address < _owners[at][1]:
            first = torch_npu.npu.default_stream().npu_stream
            return _FIRST if _owners[at][2] in (0, first) else _owners[at][2]
    raise RuntimeError("memory that torch_npu has not allocated")


def catch_up() -> None:
    """What comes next in this stream comes after its copies."""
    if _races:
        raise RuntimeError(_races.pop())
    stream = _current()
    if stream == _FIRST:
        _clock[0] += 1
    else:
        _run(stream)


def used(values: Iterable[Any]) -> None:
    """What the operation that was announced last has read and written."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.device.type == "npu":
                _used[value.untyped_storage().data_ptr()] = _clock[0]
        elif isinstance(value, (list, tuple)):
            used(value)


def _done(stream: int) -> int:
    return _made[stream] - len(_queues[stream])


def _run(stream: int, until: int | None = None) -> None:
    """Make what is in a stream's queue, each as late as possible."""
    until = _made[stream] if until is None else until
    while _done(stream) < until:
        for other in list(_queues):
            if other not in (stream, _FIRST):
                _go(other, _made[other], {stream})
        if _done(stream) < until:
            _make(_queues[stream].popleft())


def _go(stream: int, until: int, held: set[int]) -> bool:
    """Make as much of a stream's queue as needs nothing of the held ones. Returns whether `until` is reached."""
    while _done(stream) < until:
        entry = _queues[stream][0]
        if entry.run is None and _done(entry.stream) < entry.until:
            if entry.stream in held or not _go(entry.stream, entry.until, held | {stream}):
                return False
            continue
        _make(_queues[stream].popleft())
    return True


def _make(entry: _Entry) -> None:
    if entry.run is None:
        _run(entry.stream, entry.until)
    else:
        entry.run()
    entry.is_made = True


def install() -> None:
    """Follow events and waits."""
    npu = torch_npu.npu
    event, stream = npu.Event, npu.Stream

    def waited_by_host(which: Any) -> None:
        if (recorded := vars(which).get("recorded")) is not None:
            _run(*recorded[:2])

    def waited(which: Any, by: Any = None) -> None:
        recorded = vars(which).get("recorded")
        waiter = _current() if by is None else _number(by)
        if recorded is None or waiter == recorded[0]:
            return
        number, until, seen = recorded
        _seen[waiter] = max(_seen[waiter], seen)
        if waiter == _FIRST:
            _run(number, until)
        elif number != _FIRST:
            _add(waiter, _Entry(stream=number, until=until))

    def first(owner: Any, name: str, then: Callable[..., object]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **options: Any) -> Any:
            then(*args, **options)
            return original(*args, **options)

        setattr(owner, name, wrapped)

    def record(which: Any, on: Any = None) -> None:
        number = _current() if on is None else _number(on)
        vars(which)["recorded"] = number, _made[number], _clock[0] if number == _FIRST else _seen[number]

    def resized(which: torch.UntypedStorage, size: int) -> None:
        if which._cdata in _places:
            _given_back(which._cdata)
            _places[which._cdata] = 0, 0  # until it is copied again

    def kept(which: torch.Tensor, on: Any) -> None:
        for entry in _queues[_number(on)]:
            if entry.memory == _place(which):
                entry.keeps = which.untyped_storage()

    first(event, "record", record)
    first(event, "wait", waited)
    for name in ("synchronize", "query"):
        first(event, name, waited_by_host)
    first(stream, "synchronize", lambda which: _run(_number(which)))
    first(npu, "synchronize", lambda *_: [_run(number) for number in list(_queues)])
    first(torch.UntypedStorage, "resize_", resized)
    first(torch.Tensor, "record_stream", kept)
    first(npu, "empty_cache", lambda *_: [_run(number) for number in list(_queues)])
    torch.npu.synchronize, torch.npu.empty_cache = npu.synchronize, npu.empty_cache
