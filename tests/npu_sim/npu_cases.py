"""What worlds of simulated NPUs can do beside the parallel tests' cases."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import unittest.mock
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from qwen3_npu.distributed.launch import World
from qwen3_npu.platform.base import Platform


def layers_saved(platform: Platform, world: World) -> dict[str, int]:
    """Bytes that a layer keeps for backward, of each case of tests/saved.py."""
    import saved

    return {case: saved.layer_saved(case, "npu", "npu") for case in saved.CASES}


def held_bytes(platform: Platform, world: World, flags: list[str]) -> tuple[int, int]:
    """Bytes that torch_npu has allocated after a step of a training, and the number of its weights."""
    import gc

    from qwen3_npu.parity.measure import trainer

    gc.collect()
    before = torch.npu.memory_allocated()
    threads = set()
    with trainer(platform, world, flags) as made:
        for parameter in made.modules[0].parameters():
            parameter.register_hook(lambda _: threads.add(threading.get_ident()))
        made.step()
        assert threads == {threading.get_ident()}, "a thread of autograd's computed backward"
        gc.collect()
        return torch.npu.memory_allocated() - before, sum(p.numel() for m in made.modules for p in m.parameters())


def peak_bytes(platform: Platform, world: World, flags: list[str]) -> int:
    """The most bytes that torch_npu has allocated during the second step of a training."""
    import gc

    from qwen3_npu.parity.measure import trainer

    with trainer(platform, world, flags) as made:
        made.step()
        gc.collect()
        before = torch.npu.memory_allocated()
        torch.npu.reset_peak_memory_stats()
        made.step()
        return torch.npu.max_memory_allocated() - before


def operation_calls(platform: Platform, world: World) -> dict[str, int]:
    """How often each of torch_npu's operations has run in this process."""
    from sim.operations import CALLS

    return dict(CALLS)


def fused_training(platform: Platform, world: World, flags: list[str], steps: int) -> dict[str, Any]:
    """As `train`, with fused products in float32, which real ones do not take; and how often each was called."""
    import cases
    from qwen3_npu.distributed.tensor_parallel import products
    from sim import operations

    before = operation_calls(platform, world)
    with (
        unittest.mock.patch.object(products, "why_not_fused", return_value=None),
        unittest.mock.patch.object(operations, "_check_fused"),
    ):
        found = cases.train(platform, world, flags, steps)
    names = ("npu_all_gather_base_mm", "npu_mm_reduce_scatter_base")
    return {**found, "calls": [operations.CALLS[name] - before.get(name, 0) for name in names]}


def refusals(platform: Platform, world: World) -> dict[str, str]:
    """What the simulated device says to calls that a real one refuses too."""
    import torch_npu

    x, q = torch.ones(4, 8, device="npu"), torch.ones(6, 2, 32, device="npu")
    wrong: dict[str, Callable] = {
        "devices": lambda: x + torch.ones(4, 8),
        "device numbers": lambda: x + torch.ones(4, 8, device="npu:1"),
        "matmul of devices": lambda: x @ torch.ones(8, 4),
        "head_num": lambda: torch_npu.npu_fusion_attention(q, q, q, 0, "SBH"),
        "layout": lambda: torch_npu.npu_fusion_attention(q, q, q, 4, "SHB"),
        "keep_prob": lambda: torch_npu.npu_fusion_attention(q, q, q, 4, "SBH", keep_prob=0.0),
        "sparse_mode": lambda: torch_npu.npu_fusion_attention(q, q, q, 4, "SBH", sparse_mode=9),
        "rotary_mode": lambda: torch_npu.npu_rotary_mul(q[None], q[None], q[None], "third"),
        "inner_precise": lambda: torch_npu.npu_fusion_attention(q, q, q, 4, "SBH", inner_precise=1),
    }
    said = {}
    for name, call in wrong.items():
        try:
            call()
            said[name] = "accepted"
        except (RuntimeError, NotImplementedError) as error:
            said[name] = str(error).splitlines()[0]
    return said


def random_state(platform: Platform, world: World) -> list[list[float]]:
    """Numbers drawn, drawn again from the state before, and drawn from another seed."""
    torch.npu.manual_seed(3)
    state = torch.npu.get_rng_state()
    drawn = [torch.randn(8, device="npu")]
    torch.npu.set_rng_state(state)
    drawn.append(torch.randn(8, device="npu"))
    drawn.append(torch.randn(8, device="npu"))
    return [x.tolist() for x in drawn]


def collectives(platform: Platform, world: World, maximum: str = "MAX") -> dict[str, Any]:
    """Every collective on device tensors; on rank r they hold r + 1 and so on."""
    from sim import hccl

    rank, size = world.rank, world.size

    def mine(n: int = 2) -> torch.Tensor:
        return torch.arange(n, device="npu", dtype=torch.float32) + 10 * (rank + 1)

    results: dict[str, Any] = {}
    for name, op in {"sum": "SUM", "max": maximum, "min": "MIN"}.items():
        results[name] = mine()
        dist.all_reduce(results[name], op=getattr(dist.ReduceOp, op))
    results["broadcast"] = mine()
    dist.broadcast(results["broadcast"], 1)
    results["all_gather"] = torch.empty(2 * size, device="npu")
    dist.all_gather_into_tensor(results["all_gather"], mine())
    results["reduce_scatter"] = torch.empty(1, device="npu")
    dist.reduce_scatter_tensor(results["reduce_scatter"], mine(size))
    results["all_to_all"] = torch.empty(2 if rank == 0 else 4, device="npu")  # rank 0 gets one of each, rank 1 two
    dist.all_to_all_single(results["all_to_all"], mine(3), [1, 1] if rank == 0 else [2, 2], [1, 2])
    results["ring"] = torch.empty(2, device="npu")
    other = (rank + 1) % size
    operations = [dist.P2POp(dist.isend, mine(), other), dist.P2POp(dist.irecv, results["ring"], other)]
    before = hccl.COALESCED[0]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert hccl.COALESCED[0] == before + 1, "torch_npu's branch for 910B and CANN 9.0 was not taken"
    try:
        dist.all_reduce(torch.ones(1))
        results["host tensor"] = torch.zeros(1)
    except RuntimeError as error:
        results["host tensor"] = str(error).splitlines()[0]
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, {k: v if isinstance(v, str) else v.tolist() for k, v in results.items()})
    return {name: [one[name] for one in everyone] for name in results}


def answers(platform: Platform, world: World, folder: str, flags: list[str], limit: int) -> list[list[int]]:
    """Greedy answers to the prompts of the generation tests."""
    import generation
    from qwen3_npu.inference.sampling import Sampling

    with generation.runner(platform, world, folder, *flags) as made:
        return generation.generated(made, generation.prompts(), limit, Sampling(), slots=3)


def chatted(platform: Platform, world: World, folder: str, typed: str) -> str:
    """What `inference.py --task chat` shows to somebody who types these lines."""
    import generation_cases

    shown = io.StringIO()
    flags = ["--load", folder, "--task", "chat", "--prompt-type", "qwen3", "--temperature", "0", "--bf16"]
    with unittest.mock.patch.object(sys, "stdin", io.StringIO(typed)), contextlib.redirect_stdout(shown):
        generation_cases.generated(platform, world, [*flags, "--max-new-tokens", "8"])
    return shown.getvalue()


def waits(platform: Platform, world: World) -> dict[str, int | str]:
    """How often the host waits for each of some calls; what a copy that nothing waited for has brought; what is said of
    copies between streams that do not wait for each other."""
    from sim import device

    x, pageable = torch.ones(4, device="npu"), torch.zeros(4)
    pinned, stream = torch.zeros(4, pin_memory=True), torch.npu.Stream()
    calls: dict[str, Callable] = {
        "pinned": lambda: x.copy_(pinned, non_blocking=True),
        "pageable": lambda: x.copy_(pageable, non_blocking=True),
        "blocking": lambda: x.copy_(pinned),
        "item": lambda: x[0].item(),
        "tolist": lambda: x.tolist(),
        "event": lambda: torch.npu.current_stream().wait_event(stream.record_event()),
        "stream": lambda: stream.synchronize(),
    }
    found: dict[str, int | str] = {}
    for name, call in calls.items():
        before = device.counts()["waits"]
        call()
        found[name] = device.counts()["waits"] - before

    def to_host(tensor: torch.Tensor) -> None:
        with torch.npu.stream(stream):
            pinned.copy_(tensor, non_blocking=True)

    x.fill_(3.0)
    found["unordered"] = _said(lambda: to_host(x))
    stream.wait_stream(torch.npu.current_stream())
    to_host(x)
    found["too early"] = int(pinned[0].item())
    torch.npu.current_stream().wait_stream(stream)
    found["in time"] = int(pinned[0].item())
    given_back = torch.full((4,), 5.0, device="npu")
    stream.wait_stream(torch.npu.current_stream())
    to_host(given_back)
    del given_back
    found["given back"] = _said(lambda: x.add_(1))
    stream.synchronize()
    pinned.copy_(x, non_blocking=True)
    found["too early in the first stream"] = int(not pinned[0].isnan())
    torch.npu.current_stream().synchronize()
    return {**found, "in time there": int(pinned[0].item())}


def _said(call: Callable[[], object]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def on_aicpu(platform: Platform, world: World) -> list[str]:
    """What is said of some operations inside of a step, and of one outside of it."""
    from qwen3_npu.watch import here

    x = torch.arange(6, device="npu")
    calls: list[Callable] = [lambda: x.cumsum(0), lambda: x.topk(2), lambda: x.masked_fill(x > 2, 0)]
    calls += [lambda: x.float().cumsum(0), lambda: x.argsort(), lambda: x.bool().scatter(0, x[:1], True)]
    calls += [lambda: torch.searchsorted(x, x), lambda: x.int() >> 1, lambda: x.short() * 2, lambda: x.short().sum()]
    said = []
    here.at("forward")
    for call in calls:
        said.append(_said(call).partition(" runs on")[0])
    here.at("other")
    calls[0]()
    return said


def platform_facts(platform: Platform, world: World, folder: str) -> dict[str, Any]:
    """What the platform says of the (simulated) device, and that its profiler can be made."""
    import torch_npu

    from qwen3_npu.args.profile import ProfileArgs

    torch_npu.profiler.profile.__del__ = lambda self: None  # it stops a recording in CANN, begun or not
    x = torch.ones(2**20, device=world.device)
    levels = ("level0", "level1", "level2")
    made = [platform.profiler(ProfileArgs(profile=True, profile_level=n, profile_save_path=folder)) for n in levels]
    return {
        "name": platform.device_name(),
        "peak": platform.peak_flops(),
        "total": platform.memory_total(),
        "allocated": platform.memory_peak() >= x.nbytes,
        "profilers": all(isinstance(profiler, torch_npu.profiler.profile) for profiler in made),
        "float64": platform.has_float64,
        "type": x.type(),
    }
