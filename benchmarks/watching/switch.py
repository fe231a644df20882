"""Recording of positions and collectives, turned on and off between the steps of one process."""

from __future__ import annotations

from torch._C._distributed_c10d import Work
from torch.distributed import ProcessGroup

from qwen3_npu.watch import here
from qwen3_npu.watch.collectives import METHODS

_OWNERS = {name: ProcessGroup for name in (*METHODS, "_end_coalescing") if name in ProcessGroup.__dict__}
_OWNERS |= {"wait": Work}


class Switch:
    """Made before recording begins; `learn` is called after it has begun."""

    def __init__(self) -> None:
        self.methods = {False: {name: owner.__dict__[name] for name, owner in _OWNERS.items()}}

    def learn(self) -> None:
        """Take the recording methods, and what is told of positions."""
        self.methods[True] = {name: owner.__dict__[name] for name, owner in _OWNERS.items()}
        self.states = list(here._states)

    def turn(self, is_on: bool) -> None:
        """Record from now on, or do not."""
        for name, owner in _OWNERS.items():
            setattr(owner, name, self.methods[is_on][name])
        here.watch(*(self.states if is_on else ()))
