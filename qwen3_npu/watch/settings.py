"""The settings that a rank gives to the watcher it starts."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One node's watch.

    Attributes:
        folder: of the states of this node's ranks, on this machine.
        shared: folder that the watchers of all nodes see; "" if there is none.
        logs: where reports go.
        node, nodes: this one, and how many.
        local, world: ranks of this node, and of all.
        timeout: seconds without progress; 0: never, None: by the median of the steps.
        abort: end the ranks after the verdict.
        interval: steps of a window of own work; 0: no stragglers.
    """

    folder: str
    shared: str
    logs: str
    node: int
    nodes: int
    local: int
    world: int
    timeout: float | None
    abort: bool
    interval: int
