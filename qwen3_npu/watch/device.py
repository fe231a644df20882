"""Time by phase on a device: events on the compute stream, read after a later step has waited for them.

The host runs ahead of a device, so its clock shows when work was launched, not when it was done. An event is recorded
in the stream where a phase begins, and where a wait for a collective begins and ends. The time between two events
belongs to the phase, or to the group of the collective; the latter is exposed communication.

If the device reaches an event as soon as the host has recorded it, the device had to wait for the host: the time before
it is counted as the host's (launch-bound).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

_BOUND = 0.2  # the device is less than this share of a stretch behind the host: it has waited for it


Event = TypeVar("Event", bound="DeviceEvent")


class DeviceEvent(Protocol):
    """The methods of `torch.cuda.Event(enable_timing=True)` and of torch_npu's event."""

    def record(self) -> object:
        """Record the time at which the current stream reaches this point."""

    def query(self) -> bool:
        """Whether the stream has reached it."""

    def elapsed_time(self: Event, end_event: Event) -> float:
        """Milliseconds from this event to another."""


class DeviceTimes:
    """The events of one step at a time.

    Args:
        make: makes a new event.
        kinds: number of kinds of time; the last kind is the host's.
        launched: kinds of work that the host launches; their time may be counted as the host's.
    """

    def __init__(self, make: Callable[[], DeviceEvent], kinds: int, launched: frozenset[int]) -> None:
        self.make, self.kinds, self.launched = make, kinds, launched
        self.is_open = False
        self._free: list[DeviceEvent] = []
        self._marks: list[
            tuple[int, DeviceEvent, float]
        ] = []  # the kind of the time that follows, its event, and the host's clock

    def begin(self, kind: int) -> None:
        """Start to record times, unless the device has not finished the events recorded before."""
        if self._marks and not self._marks[-1][1].query():
            return
        self._clear()
        self.is_open = True
        self.mark(kind)

    def mark(self, kind: int) -> None:
        """Work that is launched from now on is of this kind."""
        if self.is_open:
            event = self._free.pop() if self._free else self.make()
            event.record()
            self._marks.append((kind, event, time.monotonic()))

    def end(self) -> None:
        """The step has been launched."""
        self.mark(0)
        self.is_open = False

    def take(self) -> Sequence[float]:
        """Seconds of each kind in the last recorded step; all 0 if none was, or the device has not finished it."""
        found = [0.0] * self.kinds
        if self.is_open or not self._marks or not self._marks[-1][1].query():
            return found
        lasted = [a.elapsed_time(b) / 1000 for (_, a, _), (_, b, _) in zip(self._marks, self._marks[1:], strict=False)]
        ends = list(itertools.accumulate(lasted))
        # The device comes to no event before the host: this is the least that their clocks can be apart.
        apart = max(host - end for end, (_, _, host) in zip([0.0, *ends], self._marks, strict=True))
        for (kind, *_), seconds, end, (_, _, host) in zip(self._marks, lasted, ends, self._marks[1:], strict=False):
            is_bound = kind in self.launched and end + apart - host < _BOUND * seconds
            found[-1 if is_bound else kind] += seconds
        self._clear()
        return found

    def _clear(self) -> None:
        self._free += [event for _, event, _ in self._marks]
        self._marks.clear()
