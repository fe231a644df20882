"""A Qwen3-MoE of transformers whose experts are linears of their own, as in published weights: peft can adapt them."""

from __future__ import annotations

from typing import Any

import torch


class Experts(torch.nn.ModuleList):
    """In place of `Qwen3MoeExperts`, with its weights."""

    def __init__(self, stacked: Any) -> None:
        super().__init__()
        for gate_up, down in zip(stacked.gate_up_proj, stacked.down_proj, strict=True):
            expert = torch.nn.Module()
            for name, weight in zip(("gate_proj", "up_proj", "down_proj"), (*gate_up.chunk(2), down), strict=True):
                linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight.data.copy_(weight.detach())
                expert.add_module(name, linear)
            self.append(expert)

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self):
            token, place = torch.where(chosen == number)
            here = x[token]
            inner = torch.nn.functional.silu(expert.gate_proj(here)) * expert.up_proj(here)
            out = out.index_add(0, token, expert.down_proj(inner) * weights[token, place, None])
        return out


def experts_apart(model: Any) -> Any:
    """The model, changed; under another name, since peft knows that transformers stacks the experts of this one."""
    model.config.model_type = "experts_apart"
    for layer in model.model.layers:
        layer.mlp.experts = Experts(layer.mlp.experts)
    return model
