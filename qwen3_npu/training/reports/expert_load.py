"""The choices of the routers, over all ranks, since the last report."""

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
        dropped: share of the choices that were dropped because of the capacity.
        balance_loss: mean over layers and micro-batches before its coefficient; 1 is even; None if it is not used.
    """

    tokens: torch.Tensor
    layers: list[int]
    dropped: float
    balance_loss: float | None

    @property
    def imbalance(self) -> torch.Tensor:
        """[layers]: the busiest expert's tokens over the mean; 1 is even."""
        return self.tokens.amax(1) / self.tokens.mean(1)

    @property
    def idle(self) -> int:
        """Number of experts, over all layers, without any token."""
        return int((self.tokens == 0).sum())

    def values(self) -> dict[str, float]:
        """The values for metrics.jsonl and tensorboard."""
        found = {"moe/imbalance": float(self.imbalance.mean()), "moe/imbalance_worst": float(self.imbalance.max())}
        found |= {"moe/idle_experts": self.idle, "moe/dropped": self.dropped}
        if self.balance_loss is not None:
            found["moe/load_balancing_loss"] = self.balance_loss
        return found | {
            f"moe/imbalance_layer_{n:03d}": float(x) for n, x in zip(self.layers, self.imbalance, strict=True)
        }

    def __str__(self) -> str:
        worst = int(self.imbalance.argmax())
        text = f"experts: busiest {self.imbalance.mean():.2f} x mean (layer {self.layers[worst]}: "
        text += f"{self.imbalance[worst]:.2f})" + (f", {self.idle} idle" if self.idle else "")
        text += f", {100 * self.dropped:.2g} % of choices dropped" if self.dropped else ""
        return text + ("" if self.balance_loss is None else f", balancing loss {self.balance_loss:.4f}")


def take_expert_load(chunks: Sequence[torch.nn.Module], layers: int, experts: int) -> ExpertLoad:
    """Collect and reset the routers' counts. Every rank must call this.

    Args:
        layers: of the whole pipeline, no-op layers included.
        experts: of a layer.
    """
    counts = torch.zeros(layers, experts + 3, device=torch.cuda.current_device())
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, Router):
                counts[module.layer_number - 1] += module.take_counts()
    dist.all_reduce(counts)
    on_host = counts.cpu().double()
    used = on_host.sum(1).nonzero().flatten().tolist()
    tokens, (dropped, losses, micro_batches) = on_host[used, :experts], on_host[used, experts:].unbind(1)
    return ExpertLoad(
        tokens,
        layers=[n + 1 for n in used],
        dropped=float(dropped.sum() / (dropped.sum() + tokens.sum())),
        balance_loss=float((losses / micro_batches).mean()) if micro_batches.any() else None,
    )
