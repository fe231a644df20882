"""Products that hide their communication, against products of whole matrices."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from qwen3_npu.distributed.launch import World
from qwen3_npu.distributed.tensor_parallel import products
from qwen3_npu.kernels import reference
from qwen3_npu.platform.base import Platform

TOKENS, BATCH, WIDTH, INNER = 24, 2, 256, 512


def _drawn(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _changed(old: str, new: str) -> Any:
    """The module with a piece of its text replaced."""
    text = Path(products.__file__).read_text()
    assert text.count(old) == 1, old
    changed = types.ModuleType("changed")
    sys.modules["changed"] = changed  # dataclasses look there
    exec(compile(text.replace(old, new), products.__file__, "exec"), changed.__dict__)
    return changed


class _Late:
    """A collective whose result is not there before somebody has waited for it."""

    def __init__(self, work: Any, output: torch.Tensor, result: torch.Tensor) -> None:
        self.work, self.output, self.result = work, output, result

    def wait(self) -> None:
        self.work.wait()
        self.output.copy_(self.result)


@contextlib.contextmanager
def _late() -> Iterator[None]:
    """Asynchronous collectives are as late as they may be."""

    def late(collective: Callable) -> Callable:
        def called(output: torch.Tensor, *given: torch.Tensor, **options: Any) -> Any:
            result = output.clone()
            work = collective(result, *given, **options)
            output.fill_(float("nan"))
            return _Late(work, output, result)

        return called

    with contextlib.ExitStack() as stack:
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"):
            stack.enter_context(mock.patch.object(dist, name, late(getattr(dist, name))))
        yield


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape, (got.shape, expected.shape)
    return float((got.float().cpu() - expected.float()).abs().max() / expected.float().abs().max())


def differences(
    platform: Platform,
    world: World,
    pieces: int = 4,
    fused: bool = False,
    frozen: bool = False,
    change: tuple[str, str] | None = None,
) -> dict[str, float]:
    """What two linked linears and their gradients differ by; and a row-parallel one without sequence parallelism.

    Args:
        pieces, fused: how communication is hidden; fused operations multiply bfloat16.
        frozen: the weights are not trained.
        change: a piece of the module's text and what to put in its place, first.
    """
    module: Any = products if change is None else _changed(*change)
    dtype, device = torch.bfloat16 if fused else torch.float32, world.device
    operations: Any = importlib.import_module("qwen3_npu.kernels.npu") if fused else None
    overlap = module.Overlap(pieces, operations, reference.add_weight_gradient)
    group, size, rank = dist.group.WORLD, world.size, world.rank
    x, grad = (_drawn(TOKENS, BATCH, WIDTH, seed=n, dtype=dtype) for n in (1, 2))
    first, second = _drawn(INNER, WIDTH, seed=3, dtype=dtype) / 16, _drawn(WIDTH, INNER, seed=4, dtype=dtype) / 16
    whole = [t.clone().requires_grad_() for t in (x, first, second)]
    out = (whole[0] @ whole[1].t() * 2) @ whole[2].t()
    out.backward(grad)

    parts = [x.chunk(size)[rank], first.chunk(size)[rank], second.chunk(size, 1)[rank].contiguous()]
    mine = [t.to(device).clone().requires_grad_(n == 0 or not frozen) for n, t in enumerate(parts)]
    link = module.Link()
    with _late():
        hidden = module.gathered_product(mine[0], mine[1], overlap, group, link=link) * 2
        got = module.scattered_product(hidden, mine[2], overlap, group, link=link)
        got.backward(grad.chunk(size)[rank].to(device))
        summed = module.summed_product(hidden.detach(), mine[2], overlap, group)
    expected = [out.chunk(size)[rank], whole[0].grad.chunk(size)[rank]]
    expected += [whole[1].grad.chunk(size)[rank], whole[2].grad.chunk(size, 1)[rank]]
    names = ("output", "gradient of x", "gradient of the first weight", "gradient of the second weight")
    results = [got, *(t.grad for t in mine)]
    found = {name: _difference(a, b) for name, a, b in zip(names, results, expected, strict=True) if a is not None}
    found["sum"] = _difference(summed, out)
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, found)
    return {name: max(one[name] for one in everyone) for name in found}
