"""Sums of gradients are divided and clipped in the optimizer's own pass, as torch does it in passes of its own."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qwen3_npu.training.update.gradients import Gradients

TOKENS = 7.0


def adamw(weights: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=0.1, weight_decay=0.1, fused=True)


def sgd(weights: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, lr=0.1)


class Halfway(torch.optim.AdamW):
    """As Muon here: it updates weights by a rule of its own."""

    def step(self, closure: None = None) -> None:
        for weight in self.param_groups[0]["params"]:
            weight.data -= 0.1 * weight.grad


def halfway(weights: list[torch.Tensor]) -> torch.optim.Optimizer:
    return Halfway(weights, lr=0.1)


def in_megatron(optimizer: torch.optim.Optimizer, clip_grad: float) -> Any:
    weights = optimizer.param_groups[0]["params"]
    return types.SimpleNamespace(
        optimizer=optimizer,
        config=types.SimpleNamespace(clip_grad=clip_grad),
        get_grad_stats_parallel_group=lambda: None,
        get_main_grads_for_grad_norm=lambda: [weight.grad for weight in weights],
        step_with_ready_grads=optimizer.step,
    )


@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("make", [adamw, sgd, halfway])
def test_steps_are_those_of_torch(
    make: Callable[[list[torch.Tensor]], torch.optim.Optimizer], clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(5, 3, generator=generator), torch.randn(4, generator=generator)]
    ours, theirs = ([torch.nn.Parameter(weight.clone()) for weight in start] for _ in range(2))
    optimizer, plain = make(ours), make(theirs)
    gradients = Gradients(in_megatron(optimizer, clip))
    for step in range(3):
        for ours_now, theirs_now in zip(ours, theirs, strict=True):
            ours_now.grad = torch.randn(ours_now.shape, generator=generator) * TOKENS * 3**step
            theirs_now.grad = ours_now.grad / TOKENS
        gradients.tokens = torch.tensor(TOKENS)
        norm, divisor = gradients.measure(torch.device("cpu"))
        expected = torch.nn.utils.clip_grad_norm_(theirs, clip or 1e9)
        torch.testing.assert_close(norm, expected)
        gradients.update(norm.item(), divisor.item())
        plain.step()
    for ours_now, theirs_now in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_now, theirs_now)
