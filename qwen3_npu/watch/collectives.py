"""Record every collective of torch.distributed in the methods of ProcessGroup, which all its functions call.

This includes functions that megatron copied from torch at import, collectives of objects, and batched sends. A call is
entered when it is made and left when `wait` of its work returns. Results do not change.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._C._distributed_c10d import ReduceOp, Work
from torch.distributed import ProcessGroup, get_global_rank, get_process_group_ranks

from qwen3_npu.processes import BESIDE
from qwen3_npu.watch.state import State
from qwen3_npu.watch.times import Times


class _Kind(NamedTuple):
    """The call of a method of ProcessGroup.

    Attributes:
        name: name of the function that users call.
        tensor: index of the argument whose dtype (and shape) is equal on all ranks; None if there is none.
        sized: whether its shape is equal on all ranks, too.
        way: 1 for sends and -1 for receives, whose second argument is the other rank.
        options: index of the argument that says how numbers are reduced; None if they are not.
    """

    name: str
    tensor: int | None = 0
    sized: bool = True
    way: int = 0
    options: int | None = None


# Method -> kind. The names of torch 2.7 and of 2.13 for the same thing stand together.
METHODS = {
    "allreduce": _Kind("all_reduce", options=1),
    "allreduce_coalesced": _Kind("all_reduce", options=1),
    "broadcast": _Kind("broadcast"),
    "reduce": _Kind("reduce", options=1),
    "allgather": _Kind("all_gather", 1, sized=False),
    "allgather_coalesced": _Kind("all_gather", 1, sized=False),
    "_allgather_base": _Kind("all_gather_into_tensor", 1),
    "all_gather_single": _Kind("all_gather_into_tensor", 1),
    "allgather_into_tensor_coalesced": _Kind("all_gather_into_tensor", 1),
    "all_gather_single_coalesced": _Kind("all_gather_into_tensor", 1),
    "reduce_scatter": _Kind("reduce_scatter", sized=False, options=2),
    "_reduce_scatter_base": _Kind("reduce_scatter_tensor", options=2),
    "reduce_scatter_single": _Kind("reduce_scatter_tensor", options=2),
    "reduce_scatter_tensor_coalesced": _Kind("reduce_scatter_tensor", options=2),
    "reduce_scatter_single_coalesced": _Kind("reduce_scatter_tensor", options=2),
    "alltoall": _Kind("all_to_all", sized=False),
    "alltoall_base": _Kind("all_to_all_single", sized=False),
    "all_to_all_single": _Kind("all_to_all_single", sized=False),
    "gather": _Kind("gather", 1, sized=False),
    "scatter": _Kind("scatter", sized=False),
    "barrier": _Kind("barrier", None),
    "monitored_barrier": _Kind("barrier", None),
    "send": _Kind("send", way=1),
    "recv": _Kind("recv", way=-1),
}
# How numbers are reduced -> how much further the operation's number is; a sum has the name alone.
_REDUCTIONS = [op for op in ReduceOp.RedOpType.__members__.values() if op.name != "SUM"]
_PLAIN = sorted({kind.name for kind in METHODS.values()})
COLLECTIVES = [*_PLAIN, *(f"{name}({op.name.lower()})" for op in _REDUCTIONS for name in _PLAIN)]
_FURTHER = {op: (1 + i) * len(_PLAIN) for i, op in enumerate(_REDUCTIONS)}
_DTYPES: dict[torch.dtype, int] = {}
for _name in ("float32", "float64", "float16", "bfloat16", "int8", "uint8", "int16", "int32", "int64", "bool"):
    _DTYPES[getattr(torch, _name)] = len(_DTYPES) + 1
DTYPE_NAMES = ["", *(str(dtype).removeprefix("torch.") for dtype in _DTYPES), "another dtype"]
_OTHER_DTYPE = len(DTYPE_NAMES) - 1

# megatron's descriptions of its groups, by the names that people use.
_LABELS = {
    "default_pg": "world",
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "DATA_PARALLEL_GROUP": "dp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp-cp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_PARALLEL_GROUP": "etp",
    "EXPERT_DATA_PARALLEL_GROUP": "edp",
    "MODEL_PARALLEL_GROUP": "tp-pp",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tp-cp",
    "TENSOR_AND_DATA_PARALLEL_GROUP": "tp-dp",
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tp-dp",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "ep-etp",
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": "ep-pp",
    "EMBEDDING_GROUP": "embedding",
    "INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP": "dp-cp",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "dist-opt",
}


def label(group: ProcessGroup) -> str:
    """A group's name for messages."""
    described = group.group_desc
    if described in ("", "undefined"):  # it has no description
        return "of ranks " + ", ".join(map(str, get_process_group_ranks(group)[:8]))
    host = described.endswith("_GLOO")
    name = described.removesuffix("_GLOO")
    return _LABELS.get(name, name.lower().removesuffix("_group")) + (" (host)" if host else "")


def _first(value: object) -> torch.Tensor | None:
    """The first tensor of an argument: a tensor, tensors, or lists of tensors."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value if isinstance(value, torch.Tensor) else None


class Recorder:
    """Records calls in a state, from `install` to `remove`."""

    def __init__(self, state: State, times: Times) -> None:
        self.state, self.times = state, times
        self.labels: dict[int, str] = {}  # channel -> what its group is called
        # id of a work -> what `leave` needs (None: of several calls), its group
        self.open: dict[int, tuple[tuple[int, int, int] | None, str]] = {}
        self.replaced: list[tuple[type, str, object]] = []

    def install(self) -> None:
        """Wrap the methods."""
        for name, kind in METHODS.items():
            if name in ProcessGroup.__dict__:
                self._replace(ProcessGroup, name, self._method(ProcessGroup.__dict__[name], kind))
        if "_end_coalescing" in ProcessGroup.__dict__:
            self._replace(ProcessGroup, "_end_coalescing", self._end(ProcessGroup.__dict__["_end_coalescing"]))
        self._replace(Work, "wait", self._wait(Work.__dict__["wait"]))

    def remove(self) -> None:
        """Remove the wrappers."""
        for owner, name, original in reversed(self.replaced):
            setattr(owner, name, original)
        self.replaced.clear()

    def _replace(self, owner: type, name: str, wrapper: object) -> None:
        self.replaced.append((owner, name, owner.__dict__[name]))
        setattr(owner, name, wrapper)

    def _method(self, original: Callable[..., object], kind: _Kind) -> Callable[..., object]:
        operation, enter = _PLAIN.index(kind.name), self.state.enter
        is_exchange = kind.name == "all_to_all_single"

        def method(group: ProcessGroup, *args: Any, **kwargs: object) -> object:
            if group.size() == 1 or threading.get_ident() in BESIDE:
                return original(group, *args, **kwargs)
            given = args if not kwargs else (*args, *kwargs.values())
            tensor = None if kind.tensor is None else _first(given[kind.tensor])
            dtype = 0 if tensor is None else _DTYPES.get(tensor.dtype, _OTHER_DTYPE)
            shape = tuple(tensor.shape) if tensor is not None and kind.sized else None
            channel = self._channel(group, kind.way, given[1] if kind.way else 0)
            further = 0
            if kind.options is not None and len(given) > kind.options:
                reduced = getattr(given[kind.options], "reduceOp", ReduceOp.SUM)
                further = _FURTHER.get(getattr(reduced, "op", reduced), 0)
            token = enter(channel, operation + further, dtype, shape)
            if is_exchange and len(given) > 3:
                self.state.exchange(token, channel, given[3], given[2])
            self.times.begin_wait(self.labels[channel])
            start = time.monotonic()
            work = original(group, *args, **kwargs)
            self._waited(self.labels[channel], time.monotonic() - start)
            if work is None:
                self.state.leave(token)
            else:
                self.open[id(work)] = token, self.labels[channel]
            return work

        return method

    def _end(self, original: Callable[..., object]) -> Callable[..., object]:
        """Several calls are handed over together: their group is that of the work."""

        def end(group: ProcessGroup, *args: object, **kwargs: object) -> object:
            work = original(group, *args, **kwargs)
            if work is not None and group.size() > 1 and threading.get_ident() not in BESIDE:
                self.open[id(work)] = None, label(group)
            return work

        return end

    def _wait(self, original: Callable[..., object]) -> Callable[..., object]:
        def wait(work: Work, *args: object, **kwargs: object) -> object:
            # Without an entry nobody else is in that group, or it has been waited for.
            if threading.get_ident() in BESIDE or id(work) not in self.open:
                return original(work, *args, **kwargs)
            token, label = self.open.pop(id(work))
            self.times.begin_wait(label)
            start = time.monotonic()
            result = original(work, *args, **kwargs)
            self._waited(label, time.monotonic() - start)
            if token is not None:
                self.state.leave(token)
            return result

        return wait

    def _waited(self, label: str, seconds: float) -> None:
        self.state.waited += seconds
        self.times.wait(label, seconds)

    def _channel(self, group: ProcessGroup, way: int, peer: int) -> int:
        key: tuple | str = (group.group_name, way, peer) if way else group.group_name
        found = self.state.channels.get(key)
        if found is not None:
            return found
        name = label(group)
        if not way:
            index = self.state.channel(key, group.group_name, name, get_process_group_ranks(group))
            self.labels[index] = name
            return index
        own = group.rank()
        pair = (own, peer) if way > 0 else (peer, own)
        ranks = [get_global_rank(group, member) for member in pair]
        direction = f"{group.group_name} {pair[0]}>{pair[1]}"
        index = self.state.channel(key, direction, f"{name}, rank {ranks[0]} to {ranks[1]}", ranks)
        self.labels[index] = name
        return index
