"""Any way of cutting the model computes what one process computes: losses and gradient norms of ten steps, fp32."""

from __future__ import annotations

import pytest

from worlds import World

STEPS = 10
BASE = ["--seq-length", "32", "--global-batch-size", "8", "--lr", "3e-3", "--train-iters", str(STEPS)]
BASE += ["--lr-decay-style", "cosine", "--lr-warmup-iters", "2", "--device", "cpu", "--eval-iters", "0"]

TP2 = ["--tensor-model-parallel-size", "2"]
SP = ["--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
VPP = ["--num-layers-per-virtual-pipeline-stage", "1"]
EP2 = ["--expert-model-parallel-size", "2"]
ETP1 = ["--expert-tensor-parallel-size", "1"]
ZERO = ["--use-distributed-optimizer"]
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather"]
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]

CHUNKS = ["--loss-compute-mode", "chunk", "--loss-chunk-size", "7"]
ULYSSES = ["--context-parallel-size", "2", "--context-parallel-algo", "ulysses_cp_algo"]
RING = ["--context-parallel-size", "2", "--context-parallel-algo", "megatron_cp_algo"]

LAYOUTS = {
    "one process, micro-batches of 4": (1, ["--micro-batch-size", "4"]),
    "one process, distributed optimizer": (1, ZERO),
    "one process, full recompute": (1, FULL),
    "one process, selective recompute": (1, ["--recompute-granularity", "selective"]),
    "one process, block recompute": (1, [*FULL[:3], "block", *FULL[4:]]),
    "one process, recomputed norms": (1, ["--recompute-norm"]),
    "one process, recomputed activation": (1, ["--recompute-activation-function"]),
    "one process, chunked loss": (1, CHUNKS),
    "one process, reference kernels": (1, ["--kernels", "reference"]),
    "TP2 SP, chunked loss": (2, TP2 + SP + CHUNKS),
    "TP2, chunked loss": (2, TP2 + CHUNKS),
    "TP2": (2, TP2),
    "TP2 SP": (2, TP2 + SP),
    "PP2": (2, PP2),
    "PP2 VPP2": (2, PP2 + VPP),
    "PP2 uneven": (2, [*PP2, "--num-layer-list", "1,3"]),
    "PP2 noop": (2, [*PP2, "--noop-layers", "0,5"]),
    "CP2 ulysses": (2, ULYSSES),
    "CP2 ring": (2, RING),
    "CP2 ring, reference kernels": (2, [*RING, "--kernels", "reference"]),
    "CP2 ulysses, selective recompute": (2, [*ULYSSES, "--recompute-granularity", "selective"]),
    "DP2": (2, []),
    "DP2 distributed optimizer": (2, ZERO),
    "DP2 distributed optimizer, overlapped": (2, ZERO + OVERLAP),
    "TP2 PP2": (4, TP2 + PP2),
    "TP2 PP2 VPP2 SP": (4, TP2 + PP2 + VPP + SP),
    "TP2 SP DP2 distributed optimizer": (4, TP2 + SP + ZERO),
    "CP4 ulysses": (4, ["--context-parallel-size", "4", *ULYSSES[2:]]),
    "CP4 ring": (4, ["--context-parallel-size", "4", *RING[2:], "--micro-batch-size", "2"]),
    "CP2 ulysses TP2 SP": (4, ULYSSES + TP2 + SP),
    "CP2 ring TP2 SP distributed optimizer": (4, RING + TP2 + SP + ZERO),
    "CP2 ring PP2 VPP2": (4, RING + PP2 + VPP),
    "PP2 DP2 distributed optimizer, overlapped": (4, PP2 + ZERO + OVERLAP),
}
MOE_LAYOUTS = {
    "one process, reference kernels": (1, ["--kernels", "reference"]),
    "one process, recomputed activation, moe": (
        1,
        ["--recompute-activation-function", "--recompute-granularity", "selective", "--recompute-modules", "moe"],
    ),
    "TP2 SP": (2, TP2 + SP),
    "PP2 VPP2": (2, PP2 + VPP),
    "DP2 distributed optimizer": (2, ZERO),
    "EP2": (2, EP2),
    "EP2 allgather": (2, [*EP2, "--moe-token-dispatcher-type", "allgather"]),
    "EP2 distributed optimizer": (2, EP2 + ZERO),
    "EP2 CP2 ring": (4, EP2 + RING),
    "CP2 ulysses TP2 SP": (4, ULYSSES + TP2 + SP),
    "TP2 SP EP2": (4, TP2 + SP + EP2),
    "TP2 SP EP2 ETP1 distributed optimizer": (4, TP2 + SP + EP2 + ETP1 + ZERO),
    "TP2 SP PP2": (4, TP2 + SP + PP2),
    "EP2 PP2 distributed optimizer": (4, EP2 + PP2 + ZERO),
}


class Baselines:
    """What one process computes, once per model."""

    def __init__(self, world: World, models: dict[str, str], tokens: str) -> None:
        self.world, self.models, self.tokens = world, models, tokens
        self.results: dict[str, dict] = {}

    def flags(self, kind: str) -> list[str]:
        balance = ["--moe-aux-loss-coeff", "0.02", "--moe-z-loss-coeff", "0.01"] if kind == "moe" else []
        return [*BASE, "--load", self.models[kind], "--data-path", self.tokens, *balance]

    def of(self, kind: str) -> dict:
        if kind not in self.results:
            self.results[kind] = self.world.run("train", flags=self.flags(kind), steps=STEPS)
        return self.results[kind]


@pytest.fixture(scope="module")
def baselines(worlds: dict[int, World], models: dict[str, str], tokens: str) -> Baselines:
    return Baselines(worlds[1], models, tokens)


# Where it matters that embedding and output layer are one weight.
TIED = ["one process, chunked loss", "TP2 SP, chunked loss", "TP2", "TP2 SP", "PP2", "PP2 VPP2", "PP2 noop"]
TIED += ["DP2 distributed optimizer", "TP2 PP2", "TP2 PP2 VPP2 SP", "CP2 ring PP2 VPP2"]
TIED += ["PP2 DP2 distributed optimizer, overlapped"]

CASES = [("untied", name, *LAYOUTS[name]) for name in LAYOUTS]
CASES += [("tied", name, *LAYOUTS[name]) for name in TIED]
CASES += [("moe", name, *MOE_LAYOUTS[name]) for name in MOE_LAYOUTS]
# Grouped by world size, so that few processes are up at a time.
CASES.sort(key=lambda case: case[2])


@pytest.mark.parametrize(("kind", "name", "size", "extra"), CASES, ids=[f"{c[0]}: {c[1]}" for c in CASES])
def test_equals_one_process(
    kind: str, name: str, size: int, extra: list[str], worlds: dict[int, World], baselines: Baselines
) -> None:
    expected = baselines.of(kind)
    assert expected["loss"][-1] < expected["loss"][0] - 0.05, "the baseline does not learn; the comparison says little"
    got = worlds[size].run("train", flags=baselines.flags(kind) + extra, steps=STEPS)
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


def test_tp_ranks_draw_different_dropout_masks(worlds: dict[int, World], baselines: Baselines) -> None:
    first, second = worlds[2].run("dropout_masks", flags=baselines.flags("untied") + TP2)
    assert first != second
    again = worlds[2].run("dropout_masks", flags=baselines.flags("untied") + TP2)
    assert again == [first, second], "the seed decides the masks"
    other = worlds[2].run("dropout_masks", flags=[*baselines.flags("untied"), *TP2, "--seed", "7"])
    assert other != [first, second], "the seed is really applied"
