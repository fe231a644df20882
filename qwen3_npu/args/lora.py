"""Flags of what is trained: everything, a part of the weights, or LoRA adapters."""

from __future__ import annotations

import dataclasses
import math

from qwen3_npu.cli import flag
from qwen3_npu.errors import UsageError

# Megatron's linears that can have an adapter, and the Hugging Face projections that each joins.
LORA_TARGETS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}


def lora_scale(alpha: float, r: int, *, is_stabilized: bool) -> float:
    """alpha / r of LoRA (arXiv:2106.09685), alpha / sqrt(r) of rsLoRA (arXiv:2312.03732)."""
    return alpha / (math.sqrt(r) if is_stabilized else r)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreezeArgs:
    """training a part of the weights"""

    freeze_include: list[str] = flag(
        [],
        metavar="PATTERN",
        help="weights that are not trained, by their Hugging Face names, with * and ? as in a shell: "
        "'model.embed_tokens.*' 'model.layers.[0-9].*'",
    )
    freeze_exclude: list[str] = flag(
        [],
        metavar="PATTERN",
        help="weights that are trained although --freeze-include names them; without --freeze-include: everything else "
        "is frozen",
    )

    @property
    def on(self) -> bool:
        return bool(self.freeze_include or self.freeze_exclude)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraArgs:
    """LoRA (on with --lora-target-modules or --lora-r)"""

    lora_r: int = flag(
        0, minimum=1, help="rank of the adapters; default: 16 with --lora-target-modules, else 0: train all weights"
    )
    lora_alpha: float = flag(32, above=0, help="the adapters' output is multiplied by alpha / r")
    lora_dropout: float = flag(0.0, minimum=0, below=1, help="dropout of the adapters' input")
    lora_target_modules: list[str] = flag(
        [], choices=tuple(LORA_TARGETS), help="linears that get an adapter; default with --lora-r: all four"
    )
    use_rslora: bool = flag(False, help="rank-stabilized: alpha / sqrt(r) instead of alpha / r (arXiv:2312.03732)")
    lora_init: str = flag(
        "kaiming",
        choices=["kaiming", "gaussian"],
        help="how A of new adapters is drawn, as peft's init_lora_weights: uniform up to 1 / sqrt(in), or normal with "
        "deviation 1 / r; B is 0",
    )
    lora_load: str | None = flag(None, metavar="DIR", help="checkpoint with adapters to start from; the base is --load")
    lora_ckpt_filter: bool = flag(False, help="save the adapters only, not the base weights")

    def __post_init__(self) -> None:
        # MindSpeed-LLM's switch are the targets, and its default rank is 16.
        if self.lora_target_modules and not self.lora_r:
            object.__setattr__(self, "lora_r", 16)
        if self.lora_r and not self.lora_target_modules:
            object.__setattr__(self, "lora_target_modules", list(LORA_TARGETS))
        if not self.lora_r and (self.lora_load or self.lora_ckpt_filter):
            raise UsageError("--lora-load and --lora-ckpt-filter need --lora-target-modules or --lora-r")

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied by."""
        return lora_scale(self.lora_alpha, self.lora_r, is_stabilized=self.use_rslora)

    @property
    def on(self) -> bool:
        return self.lora_r > 0
