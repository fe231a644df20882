"""One rank of a job whose other ranks do not exist. Collectives are recorded; tensors have sizes and no data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import token_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from qwen3_npu.distributed import agreement, turns
from qwen3_npu.distributed.launch import World
from qwen3_npu.model import dispatcher


def _same_everywhere(objects: list[object], own: object, group: object = None) -> None:
    """Gather objects: all ranks of a traced job have the same object."""
    objects[:] = [own] * len(objects)


def _balanced_counts(everyone: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows of each expert, [ep, etp, experts] int64 with data, if every expert gets the same number."""
    return torch.full(everyone.shape, rows // everyone.shape[-1], dtype=everyone.dtype)


def _same_modes() -> contextlib.AbstractContextManager:
    """torch's modes belong to a thread: what watches this one is to watch the second one, too."""
    modes = _get_current_dispatch_mode_stack()

    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            yield

    return entered()


class _HostNumbers(list[int]):
    """Numbers on the host, in place of a tensor."""

    def tolist(self) -> list[int]:
        return list(self)


@contextlib.contextmanager
def pretended(rank: int, size: int, routed_rows: int) -> Iterator[World]:
    """A process group of `size` ranks of which this process is one; inside, new tensors have no data.

    Args:
        routed_rows: copies of tokens that a rank sends to all experts in one layer and micro-batch.
    """
    new_group = dist.new_group

    def pretended_group(*args: Any, **options: Any) -> object:
        return new_group(*args, **(options | {"backend": "fake"}))

    def unchanged(module: torch.nn.Module) -> torch.nn.Module:
        return module

    def on_host(everyone: torch.Tensor, **_: object) -> torch.Tensor:
        with _disable_current_modes():
            return _balanced_counts(everyone, routed_rows)

    sizes_on_host = dispatcher.Dispatcher.sizes

    def with_data(*args: Any, **options: Any) -> object:
        with _disable_current_modes():
            return sizes_on_host(*args, **options)

    sort_chunks = token_dispatcher.sort_chunks_by_idxs

    def even_chunks(rows: torch.Tensor, sizes: torch.Tensor, _: torch.Tensor, **options: object) -> object:
        count = sizes.numel()
        even, any_order = _HostNumbers([len(rows) // count] * count), _HostNumbers(range(count))
        return sort_chunks(rows, even, any_order, **options)

    def one_hot(numbers: torch.Tensor, classes: int) -> torch.Tensor:
        # On the CPU, unlike on devices, torch looks at the numbers to check them.
        return numbers.new_zeros(*numbers.shape, classes).scatter_(-1, numbers[..., None], 1)

    changed: list[tuple[object, str, Callable[..., object]]] = [
        (dist, "new_group", pretended_group),
        (dist.distributed_c10d, "new_group", pretended_group),
        (dist, "all_gather_object", _same_everywhere),
        (agreement, "smallest", list),
        (turns, "surroundings", _same_modes),
        (dist, "broadcast_object_list", lambda *_, **__: None),
        # Weights are made in 16 bits; torch cannot exchange a module's parameters that have no data.
        (torch.nn.Module, "bfloat16", unchanged),
        (torch.nn.functional, "one_hot", one_hot),
        # torch would keep both storages of a copy without data for ever.
        (torch.UntypedStorage, "copy_", lambda storage, *_: storage),
        (token_dispatcher, "sort_chunks_by_idxs", even_chunks),
        (dispatcher, "maybe_move_tensor_to_cpu", on_host),
        (dispatcher.Dispatcher, "sizes", with_data),
    ]
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        with contextlib.ExitStack() as stack:
            for place, name, function in changed:
                stack.enter_context(mock.patch.object(place, name, function))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            yield World(rank, size, 0, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
