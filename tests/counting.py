"""What a training launches: device operations, collectives, host waits and copies, by where in the step they happen.

The same counter serves every device: a TorchDispatchMode sees each operation above the device's kernels. What torch_npu
does below (copies inside of `torch.tensor`, waits for a stream) the simulated NPU counts itself.
"""

from __future__ import annotations

import collections
import contextlib
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen3_npu.training import loop, step

Count = collections.Counter[str]

# What starts nothing on the device: memory, other names of the same memory, questions.
_FREE = (
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"),
    *("_unsafe_view", "_reshape_alias", "set_", "resize_", "record_stream", "is_pinned", "_local_scalar_dense"),
)
_COPIES = ("_to_copy", "copy_", "_copy_from")
PLACES = ("forward", "backward", "update")


def _idle() -> Count:
    return collections.Counter()


class Launches(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        operations, collectives: place in the step -> name -> how often.
        waits: place -> how often the host waited.
        copies: place -> copies between host and device.
    """

    def __init__(self, device: str, below: Callable[[], Count] = _idle) -> None:
        """Args: below: what the device itself has counted so far, "waits" and "copies"; it sees all of them."""
        super().__init__()
        self.device, self.below, self.in_schedule = device, below, False
        self.operations: dict[str, Count] = {place: collections.Counter() for place in PLACES}
        self.collectives: dict[str, Count] = {place: collections.Counter() for place in PLACES}
        self.waits: Count = collections.Counter()
        self.copies: Count = collections.Counter()

    def place(self) -> str:
        if not self.in_schedule:
            return "update"
        return "forward" if torch._C._current_graph_task_id() == -1 else "backward"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, place = func._schema.name, self.place()
        before = self.below()
        result = func(*args, **(kwargs or {}))
        changed = self.below()
        changed.subtract(before)
        self.waits[place] += changed["waits"]
        self.copies[place] += changed["copies"]
        space, _, short = name.partition("::")
        if self.below is _idle and short == "_local_scalar_dense":
            self.waits[place] += 1
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors}
        if space == "c10d":
            self.collectives[place][short] += 1
        elif self.device in devices and not (func.is_view or short in _FREE or (short in _COPIES and len(devices) > 1)):
            self.operations[place][short] += 1
        return result

    @contextlib.contextmanager
    def of_a_step(self) -> Iterator[None]:
        """Count, and tell the schedule of forward and backward passes from the update of the weights."""
        plain = step.run_schedule

        def run_schedule(*args: Any, **options: Any) -> Any:
            self.in_schedule = True
            try:
                return plain(*args, **options)
            finally:
                self.in_schedule = False

        with unittest.mock.patch.object(step, "run_schedule", run_schedule), self.below_too():
            yield

    @contextlib.contextmanager
    def below_too(self) -> Iterator[None]:
        """Count what the device itself counts outside of operations, too."""
        start = self.below()
        with self:
            yield
        if self.below is _idle:
            return
        # What no operation was seen to cause: `torch.npu.synchronize()`, `event.synchronize()`.
        rest = self.below()
        rest.subtract(start)
        self.waits["elsewhere"] += rest["waits"] - self.waits.total()
        self.copies["elsewhere"] += rest["copies"] - self.copies.total()


def counted(made: loop.Trainer, device: str, below: Callable[[], Count] = _idle) -> dict[str, Any]:
    """What the second step of a training launches, and its loss, for JSON; the first one also makes what is kept."""
    made.step()
    launches = Launches(device, below)
    with launches.of_a_step():
        result = made.step()
    found = {name: getattr(launches, name) for name in ("operations", "collectives", "waits", "copies")}
    return {**found, "loss": result.loss}


def counted_pass(run: Callable[[], object], device: str, below: Callable[[], Count] = _idle) -> dict[str, Any]:
    """As `counted`, of one pass that is no step of a training: all of it is forward."""
    launches = Launches(device, below)
    launches.in_schedule = True
    with launches.below_too():
        run()
    return {name: getattr(launches, name) for name in ("operations", "collectives", "waits", "copies")}


def per_layer(two: dict[str, Any], four: dict[str, Any], of: Sequence[str] = PLACES) -> dict[str, float]:
    """The line of a table from what models of two and four layers launch in a step of one micro-batch."""
    line: dict[str, float] = {}
    for place in of:
        for what in ("operations", "collectives"):
            few, many = (sum(counts[what][place].values()) for counts in (two, four))
            line[f"{what} {place}"] = (many - few) / 2
            line[f"outside {what} {place}"] = 2 * few - many
    for what in ("waits", "copies"):
        few, many = (sum(counts[what].values()) for counts in (two, four))
        line[what] = (many - few) / 2
        line[f"outside {what}"] = 2 * few - many
    return line
