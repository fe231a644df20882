"""Record operations, collectives and allocated bytes with their owners while a block runs."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from qwen3_npu.trace.storages import StorageWatch, storages_of

_VIEWS = set(
    [
        "detach",
        "view",
        "_unsafe_view",
        "alias",
        "t",
        "transpose",
        "expand",
        "slice",
        "select",
        "split",
        "unbind",
        "permute",
        "unsqueeze",
        "squeeze",
        "as_strided",
        "_reshape_alias",
        "split_with_sizes",
        "narrow",
        "chunk",
    ]
)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation that a device would run.

    Attributes:
        name: e.g. `aten.mm`.
        flops: of products and attention; 0 for others.
        moved: bytes of all inputs and outputs; of a fused product, of its exchange.
        ranks: of a collective's group, or of a fused product's, which has `flops`, too; empty for others.
        waits: whether the stream waits for the collective at once.
    """

    name: str
    phase: str
    flops: float
    moved: float
    ranks: tuple[int, ...] = ()
    waits: bool = True

    @property
    def is_fused(self) -> bool:
        """Whether it multiplies and communicates at once."""
        return self.flops > 0 and len(self.ranks) > 1


class TraceRecorder(StorageWatch):
    """Records operations, collectives and memory.

    Attributes:
        phase: present phase of the step.
        operations: in order; without views and empty tensors.
        waits: (number of operations before the wait, the collective).
        held: changes of allocated bytes, (bytes, owner), in order.
    """

    def __init__(self, *, experts: int, topk: int, rows_of_expert: int) -> None:
        """Args: rows_of_expert: rows of each expert of this rank in a micro-batch, if all get the same number."""
        super().__init__()
        self.experts, self.topk, self.rows_of_expert = experts, topk, rows_of_expert
        self.phase = "start"
        self.module = ""
        self.operations: list[Operation] = []
        self.waits: list[tuple[int, int]] = []
        self._works: dict[dist.Work, int] = {}  # asynchronous collectives that are not waited for yet
        self._fused: tuple[str, tuple[int, ...], int] | None = None
        self.held: list[tuple[int, str]] = []
        self._sizes: dict[int, tuple[int, str]] = {}
        with _disable_current_modes():
            self._real = torch.zeros(1)

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        out = self._without_data(func, args) if dist.get_backend() == "fake" else NotImplemented
        if out is NotImplemented:
            out = func(*args, **kwargs)
        if func.namespace == "c10d":
            self._collective(func, args, out)
        if func.namespace == "c10d" or func is torch.ops.aten._local_scalar_dense.default:
            return out
        self._operation(func, args, kwargs, out)
        for storage in self.results((args, kwargs), out):
            self._hold(storage)
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        size, label = storage.nbytes(), f"{self.phase}: {self.module}" if self.module else self.phase
        self._sizes[storage._cdata] = size, label
        self.held.append((size, label))

    def freed(self, key: int) -> None:
        """See `StorageWatch`."""
        size, label = self._sizes.pop(key)
        self.held.append((-size, label))

    def relabel(self, tensors: object, label: str) -> int:
        """Give the bytes of these tensors another owner."""
        total = 0
        for key in {storage._cdata for storage in storages_of(tensors)} & self._sizes.keys():
            size, before = self._sizes[key]
            self._sizes[key] = size, label
            self.held += [(-size, before), (size, label)]
            total += size
        return total

    def resized(self, storage: torch.UntypedStorage, size: int) -> None:
        """Record that recomputation empties a storage or fills it again."""
        if (known := self._sizes.get(storage._cdata)) is not None:
            self._sizes[storage._cdata] = size, known[1]
            self.held.append((size - known[0], known[1]))

    def _operation(self, func: OpOverload, args: tuple, kwargs: dict, out: object) -> None:
        name = func._schema.name.replace("::", ".")
        if not name.startswith("aten.") or name.split(".")[-1].rstrip("_") in _VIEWS or "empty" in name:
            return
        count = flop_registry.get(getattr(torch.ops.aten, name.removeprefix("aten.").rstrip("_"), None))
        flops = count(*args, **kwargs, out_val=out) if count else 0.0
        if flops and self._fused is not None:
            name, ranks, moved = self._fused
            self.operations.append(Operation(name, self.phase, float(flops), float(moved), ranks=ranks))
            return
        moved = sum(tensor.nbytes for tensor in tree_iter((args, kwargs, out)) if isinstance(tensor, torch.Tensor))
        self.operations.append(Operation(name, self.phase, float(flops), float(moved)))

    @contextlib.contextmanager
    def exchanging(self, name: str, group: dist.ProcessGroup, moved: int) -> Iterator[None]:
        """Record the product in the block as an operation of this name that also exchanges this number of bytes."""
        self._fused = name, tuple(dist.get_process_group_ranks(group)), moved
        try:
            yield
        finally:
            self._fused = None

    def _collective(self, func: OpOverload, args: tuple, out: object) -> None:
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(_group(args))))
        moved = sum(tensor.nbytes for tensor in tree_iter(args[:2]) if isinstance(tensor, torch.Tensor))
        name = func._schema.name.replace("::", ".").rstrip("_")
        asynchronous = _is_asynchronous(func, args)
        if asynchronous and len(ranks) > 1:
            work = next(result for result in tree_iter(out) if isinstance(result, torch.ScriptObject))
            self._works[dist.Work.unbox(work)] = len(self.operations)
        self.operations.append(Operation(name, self.phase, 0.0, float(moved), ranks=ranks, waits=not asynchronous))

    def waited(self, work: dist.Work) -> None:
        """Record that the program waits for a collective."""
        if (number := self._works.pop(work, None)) is not None:
            self.waits.append((len(self.operations), number))

    def clear(self) -> None:
        """Forget the operations so far."""
        self.operations.clear()
        self.waits.clear()
        self._works.clear()

    def _without_data(self, func: OpOverload, args: tuple) -> object:
        """The result of an operation that needs data; NotImplemented for all others."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return 2.0 if args[0].is_floating_point() else self.rows_of_expert
        if func is torch.ops.aten.masked_select.default:  # of the router's map: the chosen experts of each token
            return args[0].new_empty(args[1].numel() // self.experts * self.topk)
        if func.namespace != "c10d":
            return NotImplemented
        with _disable_current_modes():  # a work that is done
            work = torch.ops.c10d.barrier(self._real, _group(args), [], True, -1)
        results = [work if "Work" in str(result.type) else args[0] for result in func._schema.returns]
        return results[0] if len(results) == 1 else tuple(results)

    def peak(self, first: int = 0) -> tuple[int, dict[str, int]]:
        """The peak of allocated bytes, and their owners, largest first.

        Args:
            first: index of the first change that counts.
        """
        total, most, now = 0, 0, collections.Counter[str]()
        best: dict[str, int] = {}
        for number, (size, label) in enumerate(self.held):
            if size < 0 and total > most and number > first:
                most, best = total, dict(now)
            total += size
            now[label] += size
        if total > most:
            most, best = total, dict(now)
        return most, dict(sorted(((k, v) for k, v in best.items() if v), key=lambda pair: -pair[1]))


def _is_asynchronous(func: OpOverload, args: tuple) -> bool:
    """Whether a collective is asynchronous. Default values are left out of `args`."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "async_op":
            return bool(args[place] if place < len(args) else argument.default_value)
    return True  # a send or receive


def _group(args: tuple) -> Any:
    return next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))


@contextlib.contextmanager
def modules_named(recorder: TraceRecorder, chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """In the block, bytes allocated in a module's forward pass get its name as owner, with the layer's number."""
    handles = []
    for chunk in chunks:
        for name, module in chunk.named_modules():
            before: list[str] = []

            def enter(_: object, __: object, name: str = name, before: list[str] = before) -> None:
                before.append(recorder.module)
                recorder.module = name

            def leave(_: object, __: object, ___: object, before: list[str] = before) -> None:
                recorder.module = before.pop() if before else ""

            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
