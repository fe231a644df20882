"""How many tokens each expert got, over all ranks and since the last time it was asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist

from qwen3_npu.model.router import Router


@dataclasses.dataclass(frozen=True)
class ExpertLoad:
    """Tokens by layer and expert.

    Attributes:
        tokens: [layers, experts] float64 on the host; places of the pipeline without weights are left out.
        layers: their numbers, from 1, as Megatron counts.
    """

    tokens: torch.Tensor
    layers: list[int]

    @property
    def imbalance(self) -> torch.Tensor:
        """[layers]: the busiest expert's tokens over the mean; 1 is even."""
        return self.tokens.amax(1) / self.tokens.mean(1)

    @property
    def idle(self) -> int:
        """Experts, of all layers together, that no token was sent to."""
        return int((self.tokens == 0).sum())

    def values(self) -> dict[str, float]:
        """For metrics.jsonl and tensorboard."""
        found = {"moe/imbalance": float(self.imbalance.mean()), "moe/imbalance_worst": float(self.imbalance.max())}
        found["moe/idle_experts"] = self.idle
        return found | {
            f"moe/imbalance_layer_{n:03d}": float(x) for n, x in zip(self.layers, self.imbalance, strict=True)
        }

    def __str__(self) -> str:
        worst = int(self.imbalance.argmax())
        text = f"experts: busiest {self.imbalance.mean():.2f} x mean (layer {self.layers[worst]}: "
        return text + f"{self.imbalance[worst]:.2f})" + (f", {self.idle} idle" if self.idle else "")


def take_expert_load(chunks: Sequence[torch.nn.Module], layers: int, experts: int) -> ExpertLoad:
    """Collect and reset the routers' counts. Every rank must call this.

    Args:
        layers: of the whole pipeline, places without weights included.
        experts: of a layer.
    """
    counts = torch.zeros(layers, experts, device=next(chunks[0].parameters()).device)
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, Router):
                counts[module.layer_number - 1] += module.take_counts()[0]
    dist.all_reduce(counts)
    used = counts.sum(1).nonzero().flatten().tolist()
    return ExpertLoad(counts[used].double().cpu(), [n + 1 for n in used])
