"""Training on simulated NPUs equals training on the CPU: losses and gradient norms, fp32."""

from __future__ import annotations

import pytest

from worlds import World

STEPS = 3
FLAGS = ["--seq-length", "32", "--global-batch-size", "4", "--lr", "3e-3", "--train-iters", str(STEPS)]
FLAGS += ["--lr-decay-style", "cosine", "--eval-iters", "0", "--moe-aux-loss-coeff", "0.02"]

TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
VPP = ["--num-layers-per-virtual-pipeline-stage", "1"]
EP2 = ["--expert-model-parallel-size", "2"]
ZERO = ["--use-distributed-optimizer"]
ULYSSES = ["--context-parallel-size", "2", "--context-parallel-algo", "ulysses_cp_algo"]
RING = ["--context-parallel-size", "2", "--context-parallel-algo", "megatron_cp_algo"]
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
PACKED = ["--reset-attention-mask", "--reset-position-ids"]

CASES = {
    "untied: one device": ("untied", 1, []),
    "untied: full recompute": ("untied", 1, FULL),
    "untied: TP2 SP": ("untied", 2, TP2),
    "untied: PP2 VPP2": ("untied", 2, PP2 + VPP),
    "untied: CP2 ulysses": ("untied", 2, ULYSSES),
    "untied: DP2 distributed optimizer": ("untied", 2, ZERO),
    "moe: one device": ("moe", 1, []),
    "moe: EP2 distributed optimizer": ("moe", 2, EP2 + ZERO),
    "moe: TP2 SP": ("moe", 2, TP2),
    "moe: CP2 ring": ("moe", 2, RING),
}


@pytest.fixture(scope="module")
def baseline(cpu_world: World, models: dict[str, str], tokens: str) -> dict[str, dict]:
    """What the CPU computes."""
    return {
        kind: cpu_world.run("train", flags=[*FLAGS, "--load", path, "--data-path", tokens], steps=STEPS)
        for kind, path in models.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_equals_the_cpu(
    name: str, npu_worlds: dict[int, World], baseline: dict[str, dict], models: dict[str, str], tokens: str
) -> None:
    kind, size, extra = CASES[name]
    flags = [*FLAGS, "--load", models[kind], "--data-path", tokens, *extra]
    got = npu_worlds[size].run("train", flags=flags, steps=STEPS)
    assert got["loss"] == pytest.approx(baseline[kind]["loss"], rel=1e-5)
    assert got["grad_norm"] == pytest.approx(baseline[kind]["grad_norm"], rel=1e-5)
