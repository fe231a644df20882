"""Memory of inference and evaluation: weights, keys and values of a request, and how many requests fit a device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from qwen3_npu.args.inference import PREFILL_TOKENS
from qwen3_npu.args.parallel import ParallelArgs, make_layout
from qwen3_npu.distributed.layout import NOOP, Layout
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.plan.device import GIB, Device
from qwen3_npu.plan.memory import transient_bytes
from qwen3_npu.plan.parameters import stage_counts
from qwen3_npu.plan.setup import Setup
from qwen3_npu.plan.shape import Shape
from qwen3_npu.plan.verdict import USABLE

# float32 logits of a token and a copy of them: sampling sorts or exponentiates one while it has the other.
_LOGIT_BYTES = 8


@dataclasses.dataclass(frozen=True)
class RequestMemory:
    """Bytes on one device of the stage that has the least memory for requests.

    Attributes:
        weights: of the model, in 16 bits (32 without --bf16).
        working: temporary tensors of a pass, beyond weights and cache.
        request: keys and values of a request of `length` tokens, and its logits.
        fit: number of simultaneous requests of one copy of the model; 0: not even one.
    """

    setup: Setup
    length: int
    weights: float
    working: float
    request: float
    fit: int


def request_memory(shape: Shape, setup: Setup, device: Device, length: int) -> RequestMemory:
    """Memory of requests that have up to `length` tokens, prompt and answer together."""
    prefill = dataclasses.replace(setup, seq_length=min(PREFILL_TOKENS, length) if length else PREFILL_TOKENS)
    stages = [_stage(shape, prefill, device, stage, length=length) for stage in range(setup.pipeline)]
    return min(stages, key=lambda memory: memory.fit)


def _stage(shape: Shape, setup: Setup, device: Device, stage: int, *, length: int) -> RequestMemory:
    weights = float(stage_counts(shape, setup, stage).total * setup.weight_bytes)
    heads_held = max(1.0, shape.num_query_groups / setup.tensor)  # above the number of groups each device has one
    per_token = 2 * sum(setup.layers[stage]) * heads_held * shape.head_dim * setup.weight_bytes
    request = per_token * length
    if stage == setup.pipeline - 1:
        request += shape.vocab_size / setup.tensor * _LOGIT_BYTES
    working = transient_bytes(shape, setup) + 4 * setup.tokens * shape.hidden_size * setup.weight_bytes
    room = device.memory * USABLE - device.reserve - weights - working
    return RequestMemory(setup, length, weights, working, request=request, fit=max(0, math.floor(room / request)))


def setup_of_inference(layout: Layout, *, bf16: bool = True, copies: int = 1) -> Setup:
    """The settings on which memory depends, of one layout."""
    layers = tuple(tuple(sum(layer != NOOP for layer in chunk) for chunk in stage) for stage in layout.chunks)
    return Setup(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        expert=layout.expert,
        expert_tensor=layout.expert_tensor,
        data=copies,
        layers=layers,
        seq_length=1,
        bf16=bf16,
    )


def in_words(memory: RequestMemory, device: Device) -> str:
    """One line."""
    return (
        f"memory of a device: {memory.weights / GIB:.1f} GiB of weights, {memory.request / GIB:.2f} GiB for each "
        f"request of {memory.length:,} tokens; {_number(memory.fit)} at the same time fit {device.name}"
    )


def _number(fit: int) -> str:
    return f"{fit:,} requests" if fit else "not even one request"


def find_layouts(shape: Shape, arch: Qwen3Arch, device: Device, *, devices: int, length: int) -> list[RequestMemory]:
    """Layouts of `devices` that inference.py takes, those first that hold most requests.

    Raises:
        UsageError: nothing fits; the message names what would fit.
    """
    found = []
    for tensor in (size for size in range(1, min(devices, device.node) + 1) if devices % size == 0):
        for pipeline in (size for size in range(1, devices // tensor + 1) if devices // tensor % size == 0):
            parallel = ParallelArgs(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
            try:
                layout = make_layout(arch, parallel)
            except UsageError:
                continue
            copies = devices // tensor // pipeline
            found.append(request_memory(shape, setup_of_inference(layout, copies=copies), device, length))
    fitting = [memory for memory in found if memory.fit]
    if not fitting:
        least = min(memory.weights + memory.working + memory.request for memory in found) + device.reserve
        raise UsageError(
            f"no layout of --devices {devices} x {device.name} holds the weights and one request of {length} tokens: "
            f"{least / GIB:.1f} GiB are needed on each, {device.memory * USABLE / GIB:.1f} GiB are usable; give more "
            "devices or a smaller --seq-length"
        )
    return sorted(fitting, key=lambda memory: -memory.fit * memory.setup.data)


def request_table(found: Sequence[RequestMemory], top: int) -> list[str]:
    """The layouts, one per line."""
    lines = [f"   {'layout':<20}{'weights':>13}{'a request':>13}{'requests/copy':>15}{'in all':>9}"]
    for number, memory in enumerate(found[:top], 1):
        setup = memory.setup
        layout = f"TP{setup.tensor} PP{setup.pipeline}, {setup.data} {'copy' if setup.data == 1 else 'copies'}"
        lines.append(
            f"{number:>2} {layout:<20}{memory.weights / GIB:>9.1f} GiB{memory.request / GIB:>9.2f} GiB"
            f"{memory.fit:>15,}{memory.fit * setup.data:>9,}"
        )
    return lines
