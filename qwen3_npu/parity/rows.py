"""Layouts of a training over processes. Each of them must compute what one process computes."""

from __future__ import annotations

import dataclasses

TP2 = ["--tensor-model-parallel-size", "2"]
SP = ["--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
VPP = ["--num-layers-per-virtual-pipeline-stage", "1"]
EP2 = ["--expert-model-parallel-size", "2"]
ETP1 = ["--expert-tensor-parallel-size", "1"]
ZERO = ["--use-distributed-optimizer"]
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather"]
INTERLEAVED = ["--moe-fb-overlap"]
HIDDEN = ["--moe-alltoall-overlap-comm"]
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]

PIECES = ["--use-ascend-coc"]
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
    "TP2 SP, in pieces": (2, TP2 + SP + PIECES),
    "TP2, in pieces": (2, TP2 + PIECES),
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
    "TP2 SP ETP1": (2, TP2 + SP + ETP1),
    "PP2 VPP2": (2, PP2 + VPP),
    "DP2 distributed optimizer": (2, ZERO),
    "EP2": (2, EP2),
    "EP2, passes interleaved": (2, EP2 + INTERLEAVED),
    "EP2 allgather": (2, [*EP2, "--moe-token-dispatcher-type", "allgather"]),
    "EP2 distributed optimizer, exchange hidden": (2, EP2 + ZERO + HIDDEN),
    "EP2 CP2 ring, exchange hidden, passes interleaved, full recompute": (
        4,
        [*EP2, *RING, *HIDDEN, *INTERLEAVED, *FULL],
    ),
    "CP2 ulysses TP2 SP": (4, ULYSSES + TP2 + SP),
    "TP2 SP EP2, exchange hidden, full recompute": (4, TP2 + SP + EP2 + HIDDEN + FULL),
    "TP2 SP EP2 ETP1 distributed optimizer": (4, TP2 + SP + EP2 + ETP1 + ZERO),
    "TP2 SP PP2": (4, TP2 + SP + PP2),
    "EP2 PP2 distributed optimizer": (4, EP2 + PP2 + ZERO),
    "EP2 PP2 VPP2 distributed optimizer, overlapped, passes interleaved": (
        4,
        [*EP2, *PP2, *VPP, *ZERO, *OVERLAP, *INTERLEAVED],
    ),
    "EP2 DP4 distributed optimizer, overlapped, exchange hidden": (4, EP2 + ZERO + OVERLAP + HIDDEN),
}

# Layouts in which a tied output layer is treated in its own way.
TIED = ["one process, chunked loss", "TP2 SP, chunked loss", "TP2", "TP2 SP", "PP2", "PP2 VPP2", "PP2 noop"]
TIED += ["DP2 distributed optimizer", "TP2 PP2", "TP2 PP2 VPP2 SP", "CP2 ring PP2 VPP2"]
TIED += ["PP2 DP2 distributed optimizer, overlapped"]

PER_DOCUMENT = ["--reset-attention-mask"]
PACKED_LAYOUTS = {
    "one process": (1, []),
    "one process, reference kernels": (1, ["--kernels", "reference"]),
    "one process, full recompute": (1, FULL),
    "TP2 SP": (2, TP2 + SP),
    "PP2 VPP2": (2, PP2 + VPP),
    "CP2 ulysses": (2, ULYSSES),
    "CP2 ring": (2, RING),
    "TP2 SP PP2 VPP2": (4, TP2 + SP + PP2 + VPP),
    "CP2 ring TP2 SP": (4, RING + TP2 + SP),
    "CP2 ring PP2": (4, RING + PP2),
    "DP2 distributed optimizer": (2, ZERO),
}


@dataclasses.dataclass(frozen=True)
class ParityRow:
    """One line of the certificate.

    Attributes:
        model: "untied", "tied" or "moe".
        packed: documents are packed and must not attend to each other.
        size: number of processes that it needs; more are used for data parallelism.
    """

    model: str
    packed: bool
    layout: str
    size: int
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.model}{' packed' * self.packed}: {self.layout}"


def rows() -> list[ParityRow]:
    """All rows."""
    tables = [("untied", False, LAYOUTS), ("tied", False, {name: LAYOUTS[name] for name in TIED})]
    tables += [("moe", False, MOE_LAYOUTS), ("untied", True, PACKED_LAYOUTS)]
    tables += [("moe", True, {"EP2": (2, EP2), "TP2 SP EP2": (4, TP2 + SP + EP2)})]
    return [
        ParityRow(model, packed, name, size, flags=tuple(flags))
        for model, packed, table in tables
        for name, (size, flags) in table.items()
    ]
