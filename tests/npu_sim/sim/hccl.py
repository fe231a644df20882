"""HCCL by gloo: collectives on device tensors run on the host. What they bring is there after a wait, not before."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, ProcessGroupGloo, Work
from torch.utils._pytree import tree_leaves, tree_map

from qwen3_npu.watch import collectives
from sim import streams
from sim.device import host

_COLLECTIVES = """allreduce_ broadcast_ _allgather_base_ allgather_ _reduce_scatter_base_ reduce_scatter_ alltoall_base_
alltoall_ send recv_ barrier reduce_ gather_ scatter_ allgather_into_tensor_coalesced_
allreduce_coalesced_ reduce_scatter_tensor_coalesced_"""
_library = torch.library.Library("c10d", "IMPL")
_begun: dict[str, list[Any]] = {}  # group -> sends and receives that are made together
COALESCED = [0]
_under_way: dict[int, tuple[Work, list[tuple[torch.Tensor, torch.Tensor]]]] = {}  # identity of work -> what it brings
_wait_on_host = Work.wait
_host_groups: dict[str, tuple[Any, Any]] = {}  # group -> the same ranks on the host, boxed; and what keeps it alive


def _create(options: Any, backend_options: Any) -> ProcessGroupGloo:
    # Groups that were destroyed end here: each has threads, which take time even while they wait.
    for ended in _host_groups.keys() - set(dist.distributed_c10d._world.pg_names.values()):
        del _host_groups[ended]
    gloo = ProcessGroupGloo(options.store, options.group_rank, options.group_size, timeout=options.timeout)
    group = ProcessGroup(options.store, options.group_rank, options.group_size)
    group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, gloo)
    group._set_default_backend(ProcessGroup.BackendType.GLOO)
    _host_groups[options.group_id] = group.boxed(), group
    return gloo


def _emulated(operation: Any, name: str) -> Callable:
    def on_host(value: Any) -> Any:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in value._type().name():
            return _host_groups[ProcessGroup.unbox(value).group_name][0]
        return host(value).clone() if isinstance(value, torch.Tensor) else value

    def group_of(args: Any) -> str:
        boxed = (x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in x._type().name())
        return ProcessGroup.unbox(next(boxed)).group_name

    def collective(*args: Any) -> Any:
        for tensor in tree_leaves(list(args)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "npu":
                raise RuntimeError(f"HCCL {name}: a tensor on {tensor.device}")
            if isinstance(tensor, torch.Tensor) and not tensor.is_contiguous():
                raise RuntimeError(f"HCCL {name}: tensors must be contiguous")
        streams.catch_up()
        streams.used(args)
        given = [tree_map(on_host, value) for value in args]
        if name in ("allgather_", "reduce_scatter_"):
            given[:2] = _even(given[:2])
        result = operation(*given)
        work = result[-1] if isinstance(result, tuple) else result
        if name not in ("send", "barrier"):
            _bring(Work.unbox(work), zip(map(host, tree_leaves(args[0])), tree_leaves(given[0]), strict=True))
        if name in ("send", "recv_") and (begun := _begun.get(group_of(args))) is not None:
            begun.append(Work.unbox(result))
        return (args[0], result[-1]) if isinstance(result, tuple) else result  # (tensors, Work) or Work

    return collective


def _even(values: list[Any]) -> list[Any]:
    """HCCL exchanges unequal numbers of rows, gloo does not: with rows of zeros behind them they are equal."""
    rows = {len(tensor) for tensor in tree_leaves(values)}
    if len(rows) == 1:
        return values
    return tree_map(lambda x: torch.cat([x, x.new_zeros(max(rows) - len(x), *x.shape[1:])]), values)


def _bring(work: Work, results: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """When somebody waits; until then other numbers are there."""
    _under_way[id(work)] = work, list(results)
    for place, _ in _under_way[id(work)][1]:
        ctypes.memset(place.data_ptr(), 0xFF, place.nbytes)


def _wait(work: Work, *args: Any) -> bool:
    done = _wait_on_host(work, *args)
    for place, brought in _under_way.pop(id(work), (work, []))[1]:
        place.copy_(brought if brought.shape == place.shape else brought[: len(place)])
    return done


# In a stack a wait is where the watch calls it, as with the real ones, which have no frame of Python's.
_wait.__code__ = _wait.__code__.replace(co_filename=str(collectives.__file__))


class _Works:
    """Several transfers as one."""

    def __init__(self, works: list[Any]) -> None:
        self.works = works

    def wait(self, *_: Any) -> bool:
        return all(work.wait() for work in self.works)

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self.works)


def _start_coalescing(self: Any, device: torch.device) -> None:
    _begun[self.group_name] = []


def _end_coalescing(self: Any, device: torch.device) -> _Works:
    COALESCED[0] += 1
    return _Works(_begun.pop(self.group_name))


def _name(self: Any, rank: int) -> str:
    """What torch_npu's get_hccl_comm_name calls a group, of one of its ranks."""
    names = dist.distributed_c10d._world.pg_names
    (group,) = (g for g in names if _host_groups.get(names[g]) and g._get_backend(torch.device("npu")) is self)
    if dist.get_global_rank(group, group.rank()) != rank:
        raise RuntimeError(f"get_hccl_comm_name: {rank} is not this process's rank")
    return names[group]


def group_named(name: str) -> Any:
    """The host's group that a fused operation names."""
    if name not in _host_groups:
        raise RuntimeError(f"no communicator has the name {name}")
    return _host_groups[name][1]


def install() -> None:
    """Make "hccl" this."""
    Work.wait = _wait
    ProcessGroupGloo.get_hccl_comm_name = _name
    dist.Backend._plugins["HCCL"] = dist.Backend._BackendPlugin(_create, True)
    for name in _COLLECTIVES.split():
        operation = getattr(torch.ops.c10d, name).default
        _library.impl(name, _emulated(operation, name), "PrivateUse1", allow_override=True)
    # torch_npu's batch_isend_irecv coalesces sends and receives on a 910B with CANN 9.0 or later.
    ProcessGroup._start_coalescing, ProcessGroup._end_coalescing = _start_coalescing, _end_coalescing
