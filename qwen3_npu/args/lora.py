"""Flags that choose the trained weights: all, a part of them, or LoRA adapters."""

from __future__ import annotations

import dataclasses
import math
import re

from qwen3_npu.cli import flag, option
from qwen3_npu.errors import UsageError, did_you_mean
from qwen3_npu.model.arch import Qwen3Arch

# Megatron's linears that can have an adapter, and the Hugging Face projections that each joins.
LORA_TARGETS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
# Outside the layers; not of models whose output layer is the embedding.
LORA_ENDS = {"embedding": ("embed_tokens",), "output": ("lm_head",)}
ALL_TARGETS = LORA_TARGETS | LORA_ENDS
_MODULES = {
    "linear_qkv": "self_attention.linear_qkv",
    "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1",
    "linear_fc2": "mlp.linear_fc2",
}

# Target -> the layers that have it, of targets that not every layer has.
TargetLayers = tuple[tuple[str, tuple[int, ...]], ...]


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
        [],
        metavar="TARGET",
        help=f"what gets an adapter: {', '.join(ALL_TARGETS)}, or a regular expression of whole module names with the "
        "model's layer numbers, as in 'decoder.layers.[0-3].self_attention.*'; default with --lora-r: all four linears",
    )
    use_rslora: bool = flag(False, help="rank-stabilized: alpha / sqrt(r) instead of alpha / r (arXiv:2312.03732)")
    use_dora: bool = flag(
        False,
        help="DoRA: weights are a trained magnitude times a direction (arXiv:2402.09353)",
    )
    lora_init: str = flag(
        "kaiming",
        choices=["kaiming", "gaussian", "pissa"],
        help="initialization of a new A, as peft's init_lora_weights: uniform up to 1 / sqrt(in), or normal with "
        "deviation 1 / r; B is 0. pissa: A and B are the weight's largest singular vectors, the base keeps the rest "
        "(arXiv:2404.02948)",
    )
    qlora: bool = flag(
        False,
        help="keep the layers' frozen linears in 4 bits (NF4, blocks of 64) and restore them for each product "
        "(arXiv:2305.14314); the adapter alone is saved, as with --lora-ckpt-filter",
    )
    qlora_embedding: bool = flag(
        False,
        help="with --qlora: embedding and output layer are in 4 bits, too, which bitsandbytes leaves as they are",
    )
    qlora_double_quant: bool = flag(
        False,
        help="with --qlora: the scales are in 8 bits, too, as bitsandbytes' bnb_4bit_use_double_quant: 4.13 bits a "
        "weight instead of 4.5",
    )
    lora_load: str | None = flag(None, metavar="DIR", help="checkpoint with adapters to start from; the base is --load")
    lora_ckpt_filter: bool = flag(False, help="save the adapters only, not the base weights")

    def __post_init__(self) -> None:
        # In MindSpeed-LLM the targets turn LoRA on, and the default rank is 16.
        if self.lora_target_modules and not self.lora_r:
            object.__setattr__(self, "lora_r", 16)
        if self.lora_r and not self.lora_target_modules:
            object.__setattr__(self, "lora_target_modules", list(LORA_TARGETS))
        for name in ("qlora_embedding", "qlora_double_quant"):
            if getattr(self, name) and not self.qlora:
                raise UsageError(f"{option(name)}: no effect without --qlora; add it or drop the flag")
        if self.qlora and not self.lora_r:
            raise UsageError("--qlora quantizes the base of an adapter; give --lora-r or --lora-target-modules")
        if self.qlora:
            object.__setattr__(self, "lora_ckpt_filter", True)
        if self.lora_init == "pissa" and self.qlora_double_quant:
            raise UsageError(
                "--qlora-double-quant --lora-init pissa: scales are quantized for whole tensors, and a rank knows only "
                "its part of what PiSSA leaves of them; drop one"
            )
        if not self.lora_r and (self.lora_load or self.lora_ckpt_filter):
            raise UsageError("--lora-load and --lora-ckpt-filter need --lora-target-modules or --lora-r")
        for entry in self.lora_target_modules:
            _check_target(entry)

    @property
    def scale(self) -> float:
        """The factor of an adapter's output."""
        return lora_scale(self.lora_alpha, self.lora_r, is_stabilized=self.use_rslora)

    @property
    def on(self) -> bool:
        return self.lora_r > 0

    def places(self, arch: Qwen3Arch) -> tuple[tuple[str, ...], TargetLayers]:
        """The targets among `ALL_TARGETS`, and the layers of targets that only some layers have.

        Raises:
            UsageError: an expression matches nothing, the embedding is the output layer, too, or a weight has fewer
                singular vectors than the rank.
        """
        everywhere = range(arch.num_hidden_layers)
        modules = {f"decoder.layers.{i}.{_MODULES[target]}": (target, i) for target in LORA_TARGETS for i in everywhere}
        if not arch.tie_word_embeddings:
            modules["embedding.word_embeddings"] = ("embedding", 0)
            modules |= {} if arch.reward else {"output_layer": ("output", 0)}
        found: dict[str, set[int]] = {}
        for entry in self.lora_target_modules:
            matching = [
                place for name, place in modules.items() if entry == place[0] or re.fullmatch(entry, name) is not None
            ]
            if not matching and entry in LORA_ENDS:
                why = "its output layer is the embedding" if arch.tie_word_embeddings else "a reward model has none"
                raise UsageError(f"--lora-target-modules {entry}: not of {arch}: {why}; drop the target")
            if not matching:
                raise UsageError(
                    f"--lora-target-modules {entry} matches no module of {arch}; names are as in "
                    f"decoder.layers.0.self_attention.linear_qkv"
                )
            for target, layer in matching:
                found.setdefault(target, set()).add(layer)
        targets = tuple(target for target in ALL_TARGETS if target in found)
        if self.lora_init == "pissa":
            self._check_rank(arch, targets)
        some = (t for t in targets if t in LORA_TARGETS and len(found[t]) < arch.num_hidden_layers)
        return targets, tuple((target, tuple(sorted(found[target]))) for target in some)

    def _check_rank(self, arch: Qwen3Arch, targets: tuple[str, ...]) -> None:
        heads, groups, width = arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim
        ffn = arch.moe_intermediate_size if arch.is_moe else arch.intermediate_size
        sides = {"linear_qkv": (heads + 2 * groups) * width, "linear_proj": heads * width}
        sides |= {"linear_fc1": 2 * ffn, "linear_fc2": ffn, "output": arch.vocab_size}
        for target in targets:
            side = min(arch.hidden_size, sides.get(target, arch.hidden_size))
            if target != "embedding" and self.lora_r > side:
                raise UsageError(
                    f"--lora-r {self.lora_r} --lora-init pissa: weights of {target} have {side} singular vectors; "
                    f"use --lora-r {side} or less"
                )


def _check_target(entry: str) -> None:
    if entry in ALL_TARGETS:
        return
    if re.fullmatch(r"\w+", entry):
        raise UsageError(
            f"--lora-target-modules {entry} is not known; known: {', '.join(ALL_TARGETS)}, and regular expressions"
            f"{did_you_mean(entry, ALL_TARGETS)}"
        )
    try:
        re.compile(entry)
    except re.error as error:
        raise UsageError(f"--lora-target-modules {entry} is no regular expression: {error}") from None


def has_target(targets: tuple[str, ...], layers: TargetLayers, target: str | None, layer: int | None) -> bool:
    """Whether there is an adapter on a target, in a layer (None outside the layers)."""
    return target in targets and (layer is None or layer in dict(layers).get(target, (layer,)))


def spelled(targets: tuple[str, ...], layers: TargetLayers) -> str:
    """The values of --lora-target-modules for these targets."""
    numbers = {target: "|".join(map(str, found)) for target, found in layers}
    words = (rf"'.*\.({numbers[target]})\..*{target}'" if target in numbers else target for target in targets)
    return " ".join(words)
