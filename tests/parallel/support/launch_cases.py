"""What a training launches, for the tables of tests/golden."""

from __future__ import annotations

from typing import Any

import counting
from qwen3_npu.distributed.launch import World
from qwen3_npu.parity.measure import trainer
from qwen3_npu.platform.base import Platform


def _counts_below(platform: Platform) -> Any:
    """What the device itself counts; nothing but on the simulated NPU."""
    if platform.name != "npu":
        return counting._idle
    from sim import device

    return device.counts


def launches(platform: Platform, world: World, flags: list[str], models: list[str]) -> list[dict[str, Any]]:
    """`counting.counted` of the same training of several models."""
    below = _counts_below(platform)
    found = []
    for model in models:
        with trainer(platform, world, [*flags, "--load", model]) as made:
            found.append(counting.counted(made, platform.name, below))
    return found


def decoding(platform: Platform, world: World, flags: list[str], models: list[str]) -> list[dict[str, Any]]:
    """What the third token of one answer launches."""
    import generation
    from qwen3_npu.inference.engine import Engine, Request, limit_request
    from qwen3_npu.inference.sampling import Sampling

    below = _counts_below(platform)
    found = []
    for model in models:
        with generation.runner(platform, world, model, *flags) as made:
            engine, request = Engine(made, slots=1), Request(0, list(generation.prompts()[0]), 8)
            limit_request(request, made.plan.positions)
            request.sampling = Sampling()
            engine.reserve(request.prompt + request.limit)
            engine.add(request)
            engine.step()
            engine.step()
            found.append(counting.counted_pass(lambda engine=engine: engine.step(), platform.name, below))
    return found
