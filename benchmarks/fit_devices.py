"""Fit the constants of `qwen3_npu.plan.device` to step times that others published, and show how far the plan is off.

Hopper GPUs only: what is published of Ascend devices lacks the layout, or is of models with a few layers. The last
column is the error of a fit that has not seen the row.

    python benchmarks/fit_devices.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence

from qwen3_npu.model.sizes import SIZES
from qwen3_npu.plan.device import DEVICE_SPECS
from qwen3_npu.plan.setup import Setup
from qwen3_npu.plan.shape import Shape, shape_of
from qwen3_npu.plan.timing import step_time


@dataclasses.dataclass(frozen=True)
class Published:
    """One published run.

    Attributes:
        rate: tokens/s of one device.
        imbalance: tokens of the busiest expert rank over the mean.
    """

    name: str
    device: str
    shape: Shape
    setup: Setup
    rate: float
    imbalance: float = 1.0


def _stages(layers: int, pipeline: int, virtual: int = 1) -> tuple[tuple[int, ...], ...]:
    """Layers of each chunk; the embedding and the loss count as one layer where the number is two short."""
    chunks = pipeline * virtual
    each = -(-layers // chunks)
    short = each * chunks - layers
    table = [[each] * virtual for _ in range(pipeline)]
    if short == 2:
        table[0][0] -= 1
        table[-1][-1] -= 1
    elif short:
        raise ValueError((layers, pipeline, virtual))
    return tuple(tuple(row) for row in table)


def _row(
    name: str,
    model: str,
    rate: float,
    *,
    devices: int,
    batch: int,
    seq_length: int = 4096,
    tensor: int = 1,
    pipeline: int = 1,
    virtual: int = 1,
    context: int = 1,
    micro_batch: int = 1,
    full: bool = False,
    imbalance: float = 1.0,
    device: str = "H100-80G",
    **options: bool | int,
) -> Published:
    shape = shape_of(SIZES[model])
    data = devices // (tensor * context * pipeline)
    setup = Setup(
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        layers=_stages(shape.num_layers, pipeline, virtual),
        data=data,
        seq_length=seq_length,
        micro_batch=micro_batch,
        num_microbatches=batch // (data * micro_batch),
        sequence_parallel=tensor > 1,
        distributed_optimizer=True,
        recompute=shape.num_layers if full else 0,
        **options,  # type: ignore[arg-type]
    )
    return Published(name, device, shape, setup, rate=rate, imbalance=imbalance)


def _xtuner(name: str, rate: float, *, batch: int = 2048, **layout: bool | int) -> Published:
    """235B on 256 H800, 4,096 tokens, forced balance, selective recomputation of norms and activation."""
    selective = not layout.get("full", False)
    return _row(
        f"xtuner {name}",
        "qwen3-235b-a22b",
        rate,
        devices=256,
        batch=batch,
        device="H800-80G",
        recompute_norm=selective,
        recompute_activation=selective,
        **layout,  # type: ignore[arg-type]
    )


# xtuner: docs/zh_cn/benchmark/megatron_moe_benchmark.md (DeepEP and partly recomputed experts are not expressible).
# Bridge: the model cards of Megatron-Bridge (FP8 is not expressible). Pai: Pai-Megatron-Patch#643.
PUBLISHED = (
    _xtuner("TP2 EP8 PP8", 1189, tensor=2, expert=8, pipeline=8),
    _xtuner("TP2 EP8 PP8 zero overlap", 1105, tensor=2, expert=8, pipeline=8, overlap_grads=True, overlap_params=True),
    _xtuner(
        "TP2 EP8 PP8 zero and TP overlap",
        1119,
        tensor=2,
        expert=8,
        pipeline=8,
        overlap_grads=True,
        overlap_params=True,
        overlap_tensor=True,
    ),
    _xtuner("TP2 EP32 PP8 VPP4", 926, tensor=2, expert=32, pipeline=8, virtual=4),
    _xtuner("TP4 EP8 PP8 VPP4", 924, tensor=4, expert=8, pipeline=8, virtual=4),
    _xtuner("TP2 EP8 PP32 VPP3", 1462, tensor=2, expert=8, pipeline=32, virtual=3),
    _xtuner(
        "TP1 EP8 PP32 VPP3 MBS4 full", 1541, expert=8, pipeline=32, virtual=3, micro_batch=4, batch=4096, full=True
    ),
    _xtuner(
        "TP1 EP8 PP32 VPP3 MBS8 full", 1521, expert=8, pipeline=32, virtual=3, micro_batch=8, batch=8192, full=True
    ),
    _xtuner(
        "TP2 EP8 PP32 VPP3 MBS4 full",
        1507,
        tensor=2,
        expert=8,
        pipeline=32,
        virtual=3,
        micro_batch=4,
        batch=4096,
        full=True,
    ),
    _xtuner("TP2 EP8 PP32 MBS4 full", 1415, tensor=2, expert=8, pipeline=32, micro_batch=4, batch=8192, full=True),
    _row("Bridge 8B", "qwen3-8b", 10456, devices=16, batch=1024, overlap_grads=True, overlap_params=True),
    _row("Bridge 8B SFT 2048 TP4", "qwen3-8b", 2207, devices=4, batch=128, seq_length=2048, tensor=4, packed=True),
    _row(
        "Bridge 8B SFT 32K TP4 CP2",
        "qwen3-8b",
        457,
        devices=8,
        batch=8,
        seq_length=32768,
        tensor=4,
        context=2,
        packed=True,
    ),
    _row("Bridge 8B LoRA", "qwen3-8b", 8429, devices=1, batch=128, seq_length=2048, lora_rank=8, packed=True),
    _row(
        "Bridge 30B EP16 forced",
        "qwen3-30b-a3b",
        13011,
        devices=16,
        batch=1024,
        expert=16,
        overlap_experts=True,
        overlap_grads=True,
        overlap_params=True,
    ),
    _row(
        "Bridge 30B EP16 natural",
        "qwen3-30b-a3b",
        8655,
        devices=16,
        batch=1024,
        expert=16,
        overlap_experts=True,
        overlap_grads=True,
        overlap_params=True,
        imbalance=1.6,
    ),
    _row(
        "Bridge 30B SFT 32K TP8 CP2 EP8",
        "qwen3-30b-a3b",
        459,
        devices=16,
        batch=16,
        seq_length=32768,
        tensor=8,
        context=2,
        expert=8,
        packed=True,
        imbalance=1.3,
    ),
    _row(
        "Bridge 30B LoRA TP4 EP4",
        "qwen3-30b-a3b",
        733,
        devices=4,
        batch=128,
        seq_length=2048,
        tensor=4,
        expert=4,
        lora_rank=8,
        packed=True,
        imbalance=1.3,
    ),
    _row(
        "Pai 30B PP2 EP8 8K",
        "qwen3-30b-a3b",
        6325,
        devices=16,
        batch=128,
        seq_length=8192,
        pipeline=2,
        expert=8,
        device="H800-80G",
    ),
    _row(
        "Pai 30B PP4 EP4 8K",
        "qwen3-30b-a3b",
        6244,
        devices=16,
        batch=256,
        seq_length=8192,
        pipeline=4,
        expert=4,
        device="H800-80G",
    ),
)


# Not in the fit: what `Setup` cannot say decides these (HybridEP; host-bound loops of a few small batches).
NOT_FITTED = ("SFT", "LoRA", "EP16")

BOUNDS = {
    "product": (0.4, 0.95),
    "product_half": (1e8, 2e10),
    "attention": (0.2, 0.8),
    "streaming": (0.2, 0.9),
    "transfer": (0.3, 0.95),
    "stall": (1e-5, 8e-3),
}
_PRIOR = 0.01  # cost of a factor e away from the start: constants that no row decides stay where they are


def planned_rate(row: Published, constants: Mapping[str, float]) -> float:
    """Tokens/s of one device."""
    device = dataclasses.replace(DEVICE_SPECS[row.device], **constants)  # type: ignore[arg-type]
    seconds = step_time(row.shape, row.setup, device, imbalance=row.imbalance).total
    return row.setup.global_batch * row.setup.seq_length / row.setup.devices / seconds


def error(row: Published, constants: Mapping[str, float]) -> float:
    return planned_rate(row, constants) / row.rate - 1


def fit(rows: Sequence[Published], start: Mapping[str, float], tries: int) -> dict[str, float]:
    """The constants with the least mean |log(planned / published)|: a seeded random search around the best."""

    def cost(constants: Mapping[str, float]) -> float:
        off = statistics.mean(min(abs(math.log1p(error(row, constants))), 1.0) for row in rows)
        return off + _PRIOR * sum(abs(math.log(constants[name] / start[name])) for name in start)

    random_numbers, best, step = random.Random(0), dict(start), 0.3
    least = cost(best)
    for _ in range(tries):
        tried = dict(best)
        for name in random_numbers.sample(list(BOUNDS), 2):
            low, high = BOUNDS[name]
            tried[name] = min(high, max(low, tried[name] * math.exp(random_numbers.gauss(0, step))))
        if (found := cost(tried)) < least:
            best, least = tried, found
        else:
            step = max(0.03, step * 0.995)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=600, help="tried sets of constants, of each fit")
    tries = parser.parse_args().tries
    start = {"product": 0.75, "product_half": 4e9, "attention": 0.5, "streaming": 0.75, "transfer": 0.75, "stall": 1e-3}
    fitted = [row for row in PUBLISHED if not any(part in row.name for part in NOT_FITTED)]
    constants = fit(fitted, start, tries)
    print(f"{'run':<40} {'tokens/s':>9} {'planned':>9} {'error':>6} {'left out':>9}")
    off = []
    for row in PUBLISHED:
        line = f"{row.name:<40} {row.rate:>9,.0f} {planned_rate(row, constants):>9,.0f} {error(row, constants):>+6.0%}"
        if row in fitted:
            alone = error(row, fit([other for other in fitted if other is not row], start, tries))
            off.append(abs(alone))
            line += f" {alone:>+9.0%}"
        print(line)
    print(f"median error of {len(off)} rows, each left out of its fit: {statistics.median(off):.1%}")
    print(json.dumps({name: float(f"{value:.3g}") for name, value in constants.items()}))


if __name__ == "__main__":
    main()
