"""The settings that a rank passes to the watcher that it starts."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one node's watcher.

    Attributes:
        folder: local folder of the states of this node's ranks.
        shared: folder that the watchers of all nodes see; "" if there is none.
        logs: folder of reports.
        node, nodes: number of this node, and number of nodes.
        local, world: number of ranks of this node, and of all nodes.
        timeout: seconds without progress; 0: never; None: from the median step.
        abort: end the ranks after the verdict.
        interval: steps between comparisons of own work; 0: none.
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
