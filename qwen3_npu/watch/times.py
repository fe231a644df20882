"""Times of a rank: own work by phase, waits by group of ranks, garbage collection. No torch."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence

from qwen3_npu.watch.device import DeviceEvent, DeviceTimes
from qwen3_npu.watch.state import PHASES, STEP

_OF_RANKS = ("tp", "pp", "dp", "dp-cp", "cp", "ep", "etp", "edp", "tp-pp", "tp-cp", "tp-dp", "ep-etp", "ep-pp")
GROUPS = (*_OF_RANKS, "embedding", "dist-opt", "world", "other groups")
# pause: between steps, without a use of the processor; host: see `device`
KINDS = (*PHASES, *(f"wait {name}" for name in GROUPS), "garbage", "pause", "host")
IN_STEP = [*map(PHASES.index, STEP)]
IN_STEP += [number for number, kind in enumerate(KINDS) if kind.startswith("wait ")]
_NUMBERS = {name: len(PHASES) + i for i, name in enumerate(GROUPS)}
_OTHER, _GARBAGE, _PAUSE = PHASES.index("other"), KINDS.index("garbage"), KINDS.index("pause")
_LAUNCHED = frozenset(PHASES.index(name) for name in ("forward", "backward", "reduce", "optimizer"))


def _number(label: str) -> int:
    return _NUMBERS.get(label.removesuffix(" (host)"), _NUMBERS["other groups"])


class Times:
    """Seconds of each kind since the last `take`, by the host's clock. Each moment belongs to one kind.

    Args:
        event: makes events of the device, if there is one; `device` measures single steps with them.
    """

    def __init__(self, event: Callable[[], DeviceEvent] | None = None) -> None:
        self.device = DeviceTimes(event, len(KINDS), _LAUNCHED) if event is not None else None
        self.seconds = [0.0] * len(KINDS)
        self.phase, self.held, self.elsewhere = 0, False, 0.0  # seconds of this phase that are of another kind
        self.since = self.began = self.collecting = time.monotonic()
        self.used = 0.0  # processor time when this stretch of `other` began

    def enter_phase(self, phase: int) -> None:
        """Enter a phase."""
        now = time.monotonic()
        lasted = max(now - self.since - self.elsewhere, 0.0)
        if self.phase == _OTHER:
            pause = max(lasted - (time.thread_time() - self.used), 0.0)
            self.seconds[_PAUSE] += pause
            lasted -= pause
        if phase == _OTHER:
            self.used = time.thread_time()
        self.seconds[self.phase] += lasted
        self.phase, self.since, self.elsewhere = phase, now, 0.0
        if self.device is not None:
            self.device.mark(phase)

    def finish_step(self, step: int) -> None:
        """A step is done."""
        self.enter_phase(_OTHER)
        if self.device is not None:
            self.device.end()

    def next_step(self) -> None:
        """Measure the next step on the device."""
        if self.device is not None:
            self.device.begin(_OTHER)

    def begin_wait(self, label: str) -> None:
        """A collective of a group begins, or the wait for it."""
        if self.device is not None and self.device.is_open:
            self.device.mark(_number(label))

    def wait(self, label: str, seconds: float) -> None:
        """Add time that this rank has waited for others of a group."""
        self.seconds[_number(label)] += seconds
        self.elsewhere += seconds
        if self.device is not None:
            self.device.mark(self.phase)

    def collects(self, phase: str, info: object) -> None:
        """A callback for `gc.callbacks`."""
        if phase == "start":
            self.collecting = time.monotonic()
        else:
            seconds = time.monotonic() - self.collecting
            self.seconds[_GARBAGE] += seconds
            self.elsewhere += seconds

    def take(self) -> Sequence[float]:
        """Seconds of `KINDS` and of the wall clock, since the last call; then of `KINDS` in one step, by the device."""
        self.enter_phase(self.phase)
        on_device = self.device.take() if self.device is not None else [0.0] * len(KINDS)
        found = [*self.seconds, self.since - self.began, *on_device]
        self.seconds, self.began = [0.0] * len(KINDS), self.since
        return found

    def install(self) -> None:
        """Listen to Python's garbage collection, until `remove`."""
        gc.callbacks.append(self.collects)

    def remove(self) -> None:
        """Stop to listen."""
        gc.callbacks.remove(self.collects)
