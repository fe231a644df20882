"""What activations take: context parallelism divides it by its size; recomputing, and a loss in chunks, take less."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from pairs import write_pairs
from qwen3_npu.parity.rows import CHUNKS, EP2, FULL, HIDDEN, OVERLAP, PP2, RING, SP, TP2, ULYSSES, VPP, ZERO
from worlds import World

BASE = ["--seq-length", "1024", "--train-iters", "2", "--lr", "1e-3", "--device", "cpu", "--eval-iters", "0"]
BASE += ["--split", "1,0,0"]
Measure = Callable[..., list[dict[str, int]]]


@pytest.fixture(scope="module")
def measure(worlds: dict[int, World], tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """Model, processes, flags -> bytes kept for backward and at the peak, of each rank."""
    folder = tmp_path_factory.mktemp("long")
    changes = {"max_position_embeddings": 1024}
    models = {k: str(tiny.write_model(folder / k, tiny.arch(k, **changes))) for k in ("untied", "moe")}

    @functools.cache
    def run(kind: str, size: int, *extra: str) -> list[dict[str, int]]:
        flags = [*BASE, "--data-path", tokens, "--load", models[kind], *extra]
        return worlds[size].run("activation_bytes", flags=flags)

    return run


CONTEXT = {
    "CP2 ulysses": (2, 2, ULYSSES),
    "CP2 ring": (2, 2, RING),
    "CP4 ulysses": (4, 4, ["--context-parallel-size", "4", *ULYSSES[2:]]),
    "CP4 ring": (4, 4, ["--context-parallel-size", "4", *RING[2:]]),
    "CP2 ring TP2 SP": (4, 4, RING + TP2 + SP),
}


@pytest.mark.parametrize("name", CONTEXT)
def test_context_parallelism_divides_memory(name: str, measure: Measure) -> None:
    """Ulysses keeps the attention's result twice, once for each side of the exchange: hence the 15 %."""
    parts, size, extra = CONTEXT[name]
    (alone,) = measure("untied", 1)
    for rank in measure("untied", size, *extra):
        assert rank["kept"] <= 1.15 / parts * alone["kept"]
        assert rank["peak"] <= 1.15 / parts * alone["peak"]


@pytest.mark.parametrize("recompute", [[], FULL], ids=["kept", "recomputed"])
def test_preference_training_with_lora_takes_hardly_more_than_fine_tuning(
    recompute: list[str], worlds: dict[int, World], models: dict[str, str], tmp_path: Path
) -> None:
    """On as many tokens; the reference is the model without its adapter, whose pass keeps nothing."""
    flags = ["--seq-length", "256", "--train-iters", "2", "--lr", "1e-3", "--device", "cpu", "--eval-iters", "0"]
    flags += ["--split", "1,0,0", "--load", models["untied"], "--lora-r", "4", *recompute]
    sft = ["--stage", "sft", "--data-path", str(tiny.write_instructions(tmp_path / "sft")), "--micro-batch-size", "4"]
    dpo = ["--stage", "dpo", "--data-path", write_pairs(tmp_path / "pairs"), "--micro-batch-size", "2"]
    (fine_tuning,), (preference,) = (worlds[1].run("activation_bytes", flags=flags + kind) for kind in (sft, dpo))
    assert preference["peak"] <= 1.15 * fine_tuning["peak"]
    assert preference["kept"] <= 1.15 * fine_tuning["kept"]


PACKED = ["--stage", "sft", "--reset-attention-mask"]
SWAPPED = ["--swap-attention", "--swap-modules", "input_norm,self_attention,post_attention_norm"]
MLPS = [*SWAPPED, "--recompute-num-layers", "1"]
SELECTIVE, REFERENCE = ["--recompute-granularity", "selective"], ["--kernels", "reference"]
# What is kept at most, of what is kept without the flags.
LESS = {
    "whole layers": ("untied", FULL, [], 0.30),
    "two whole layers of four": ("untied", [*FULL[:3], "block", "--recompute-num-layers", "2"], [], 0.60),
    "attention": ("untied", SELECTIVE, REFERENCE, 0.40),
    "MLP": ("untied", [*SELECTIVE, "--recompute-modules", "mlp"], [], 0.86),
    "norms": ("untied", ["--recompute-norm"], [], 0.88),
    "activation function": ("untied", ["--recompute-activation-function"], [], 0.96),
    "loss in chunks": ("untied", CHUNKS, [], 0.97),
    "whole layers, MoE": ("moe", FULL, [], 0.30),
    "experts": ("moe", [*SELECTIVE, "--recompute-modules", "moe"], [], 0.78),
    "experts' first product": ("moe", ["--moe-zero-memory", "level0"], [], 0.9),
    "experts and their exchange": ("moe", ["--moe-zero-memory", "level1"], [], 0.78),
    "attention swapped": ("untied", ["--swap-attention"], [], 0.65),
    "norms and attention swapped, MLPs again": ("untied", [*SWAPPED, "--recompute-num-layers", "4"], [], 0.3),
    "experts' activation function": ("moe", ["--recompute-activation-function"], [], 0.95),
}


# Kind of model, processes, what is computed, and with which memory.
SAME = {
    "experts' first product again": ("moe", 1, ["--bf16"], ["--moe-zero-memory", "level0"]),
    "everything, EP2, exchange hidden": (
        "moe",
        2,
        ["--bf16", *EP2, *ZERO, *HIDDEN],
        [*SWAPPED, "--moe-zero-memory", "level1", "--reuse-fp32-param"],
    ),
    "attention swapped instead of recomputed": (
        "untied",
        1,
        [*PACKED, "--bf16", "--recompute-norm"],
        ["--swap-attention", *FULL],
    ),
    "swapped, LoRA": ("moe", 1, ["--lora-r", "4", "--attention-dropout", "0.1"], MLPS),
    "swapped, PP2 VPP2": ("untied", 2, [*PP2, *VPP], MLPS),
    "swapped, DP2 overlapped": ("untied", 2, [*ZERO, *OVERLAP, "--bf16"], SWAPPED),
    "swapped, ring": ("untied", 2, [*RING, *PACKED], SWAPPED),
    "swapped, EP2 TP2": ("moe", 4, [*EP2, *TP2, *SP], MLPS),
}


@pytest.mark.parametrize("name", SAME)
def test_memory_that_is_saved_changes_no_bit(
    name: str, worlds: dict[int, World], models: dict[str, str], tokens: str, tmp_path: Path
) -> None:
    kind, size, common, saving = SAME[name]
    data = str(tiny.write_instructions(tmp_path / "packs", pack=32)) if "sft" in common else tokens
    flags = ["--seq-length", "32", "--train-iters", "2", "--lr", "1e-3", "--device", "cpu", "--global-batch-size", "4"]
    flags += ["--load", models[kind], "--data-path", data, *common]
    plain, less = (worlds[size].run("train", flags=flags + more, steps=2) for more in ([], saving))
    assert less == plain


@pytest.mark.parametrize("name", LESS)
def test_less_is_kept(name: str, measure: Measure) -> None:
    kind, flags, others, limit = LESS[name]
    assert measure(kind, 1, *others, *flags)[0]["kept"] <= limit * measure(kind, 1, *others)[0]["kept"]
