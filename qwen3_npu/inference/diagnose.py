"""Find the module that computes NaN or infinity: repeat the forward pass and check every module's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from qwen3_npu.errors import Stopped
from qwen3_npu.inference.runner import Runner


def check_finite_scores(runner: Runner, scores: Iterable[float], texts: Sequence[Sequence[int]]) -> None:
    """Continue only if scores are finite numbers. Every process of a copy of the model has the same scores.

    Args:
        scores: on the host, so the check is cheap.
        texts: the tokens of the pass.

    Raises:
        Stopped: a score is NaN or +infinity; the first module whose output is not finite is named.
    """
    if any(math.isnan(score) or score == math.inf for score in scores):
        stop(runner, texts)


def stop(runner: Runner, texts: Sequence[Sequence[int]]) -> NoReturn:
    """Raises: Stopped: always, and names the module. Every process of a copy of the model calls it."""
    found: list[tuple[int, int, str]] = []
    handles = []

    def watch(name: str) -> Callable[[torch.nn.Module, object, object], None]:
        def hook(module: torch.nn.Module, args: object, output: object) -> None:
            # Only the first module counts: later ones have received its numbers.
            if not found and not all(map(_finite, _tensors(output))):
                found.append((runner.stage, _layer(name), name))

        return hook

    for name, module in runner.model.named_modules():
        if name:
            handles.append(module.register_forward_hook(watch(name)))
    try:
        tokens = [token for text in texts for token in text]
        lengths = [len(text) for text in texts]
        runner.anyone(True)
        runner.forward(tokens, runner.packed(lengths), [len(tokens) - 1])
    finally:
        for handle in handles:
            handle.remove()
    group = parallel_state.get_model_parallel_group()
    parts: list[list[tuple[int, int, str]]] = [[] for _ in range(group.size())]
    dist.all_gather_object(parts, found, group=group)
    everything = sorted(one for part in parts for one in part)
    where = f"first in the output of {everything[0][2]}" if everything else "in the logits only"
    raise Stopped(
        f"the model's numbers are not finite (NaN or infinity), {where}; the weights are finite: it is an overflow "
        "or a broken kernel: try without --bf16, or --kernels reference"
    )


def _layer(name: str) -> int:
    """Sort key of a module: layers by their number in the stage, other modules before (embedding) or after them."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else -1 if name.startswith("embedding") else 1 << 30


def _finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _tensors(output: object) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    return [t for one in output for t in _tensors(one)] if isinstance(output, tuple | list) else []
