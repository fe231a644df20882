"""Fit the constants of `qwen3_npu.plan.device` to step times that others published, and show how far the plan is off.

Hopper GPUs from published_runs.txt; Ascend devices from MindSpeed-LLM's CI, if its file is given. The last column is
the error of a fit that has not seen the row.

The CI's models have few layers, so its host decides many of its step times. A micro-batch takes what the device needs
or what the host needs to launch it, whichever is more. What MindSpeed-LLM launches is what megatron-core's program
launched here on a simulated NPU before this project fused it (tests/golden/launches_npu.txt at commit 607809a); beside
that the fit finds one pause of its host in a micro-batch (batch, loss), which no plan of this project uses.

    python benchmarks/planning/fit_devices.py [--npu-csv mindspeed_ci.csv]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.planning.mindspeed_ci import read_cases
from benchmarks.planning.published import Published, read_published
from qwen3_npu.plan.activations import MINDSPEED
from qwen3_npu.plan.device import DEVICE_SPECS
from qwen3_npu.plan.setup import Setup
from qwen3_npu.plan.shape import Shape
from qwen3_npu.plan.timing import step_time

BOUNDS = {
    "product": (0.4, 0.85),
    "product_half": (1e9, 2e10),
    "attention": (0.2, 0.8),
    "streaming": (0.2, 0.9),
    "transfer": (0.3, 0.95),
    "stall": (1e-4, 2e-2),
    "launch": (1e-5, 2e-4),
    "pause": (1e-3, 5e-2),
    "host_link": (5e9, 3e10),
}
# Of a layer without and with experts, forward and backward, and outside of the layers.
_LAUNCHES = {False: (16, 31), True: (51, 58)}
_MORE = {"expert": (5, 0), "sequence_parallel": (8, 0), "ring": (19, 17)}
_ONE_EXPERT = (5, 9)  # slice, two products and SwiGLU, put together; two gradients of each product, two sums
# Flags of cases that only show: of tuning the lengths are not known; exchanges in two dimensions, and attention that
# adds scores to the whole square, are not planned.
UNTIMED = {"stage", "tp-2d", "square-alibi-mask"}
_ENDS = 44 + 17
# Constants at the start of a fit, and which are fitted.
HOPPER = {"product": 0.75, "product_half": 4e9, "attention": 0.5, "streaming": 0.75, "transfer": 0.75, "stall": 1e-3}
ASCEND = {**HOPPER, "launch": 3e-5, "pause": 1e-2, "host_link": 2.5e10}
_PRIOR = 0.003  # cost of a factor e away from the start: constants that no row decides stay where they are


def npu_runs(path: Path, scripts: Path | None) -> tuple[Published, ...]:
    """The cases of MindSpeed-LLM's CI that the plan can express, as rates of one device."""
    runs = []
    for case in read_cases(path, scripts):
        if case.shape is None or case.setup is None or case.missing or not case.seconds or "@" in case.name:
            continue
        rate = case.setup.global_batch * case.setup.seq_length / case.setup.devices / case.seconds
        name = "910C-64G" if "A3" in case.name else "910B-64G"
        is_fitted = not UNTIMED & set(case.flags)
        launched = _launched(case.shape, case.setup, one_by_one="moe-grouped-gemm" not in case.flags)
        runs.append(
            Published(case.name, name, case.shape, case.setup, rate=rate, is_fitted=is_fitted, launched=launched)
        )
    return tuple(runs)


def _launched(shape: Shape, setup: Setup, *, one_by_one: bool) -> float:
    """Operations of a micro-batch that the host of MindSpeed-LLM launches, of the stage with most layers.

    Args:
        one_by_one: experts are computed one after the other.
    """
    stage = max(range(setup.pipeline), key=lambda stage: sum(setup.layers[stage]))
    again = min(setup.recompute, sum(setup.layers[stage])) / max(1, sum(setup.layers[stage]))
    used = {
        "expert": setup.expert > 1,
        "sequence_parallel": setup.sequence_parallel,
        "ring": setup.ring and setup.context > 1,
    }
    total = float(_ENDS)
    for has_experts, number in setup.layer_kinds(shape, stage).items():
        more = [_MORE[name] for name, is_used in used.items() if is_used and (has_experts or name != "expert")]
        more += [_ONE_EXPERT] * (shape.num_experts // setup.expert if has_experts and one_by_one else 0)
        forward, backward = (sum(counts) for counts in zip(_LAUNCHES[has_experts], *more, strict=True))
        total += number * (forward * (1 + again) + backward)
    return total


def planned_rate(row: Published, constants: Mapping[str, float]) -> float:
    """Tokens/s of one device."""
    own: dict[str, float | str] = {name: value for name, value in constants.items() if name != "pause"}
    if row.launched:
        own |= {"launch": 0.0, "kernels": MINDSPEED}
    device = dataclasses.replace(DEVICE_SPECS[row.device], **own)  # type: ignore[arg-type]
    time, setup = step_time(row.shape, row.setup, device, imbalance=row.imbalance), row.setup
    seconds = time.total
    if row.launched:
        passes = setup.num_microbatches + (setup.pipeline - 1) / setup.virtual
        if (
            row.shape.is_moe and setup.expert * setup.expert_tensor == 1
        ):  # masks select tokens: their number is asked for
            layers = setup.layer_kinds(row.shape, setup.pipeline - 1).get(True, 0)
            seconds += passes * layers * (2 + min(1.0, setup.recompute / max(1, layers))) * device.stall
        busy = (seconds - time.data - time.optimizer) / passes
        seconds += passes * max(0.0, row.launched * constants["launch"] + constants["pause"] - busy)
    return row.setup.global_batch * row.setup.seq_length / row.setup.devices / seconds


def error(row: Published, constants: Mapping[str, float]) -> float:
    """Planned over measured seconds of a step, less 1."""
    return row.rate / planned_rate(row, constants) - 1


def fit(rows: Sequence[Published], start: Mapping[str, float], tries: int) -> dict[str, float]:
    """The constants with the least mean |log(planned / published)|: a seeded random search, a third of it between the
    bounds, the rest around the best."""

    def cost(constants: Mapping[str, float]) -> float:
        off = statistics.mean(min(abs(math.log1p(error(row, constants))), 1.0) for row in rows)
        return off + _PRIOR * sum(abs(math.log(constants[name] / start[name])) for name in start)

    random_numbers, best, step = random.Random(0), dict(start), 0.3
    least = cost(best)
    for number in range(tries):
        tried = dict(best)
        if number < tries // 3:
            tried = {name: math.exp(random_numbers.uniform(*map(math.log, BOUNDS[name]))) for name in start}
        for name in random_numbers.sample(list(start), 2):
            low, high = BOUNDS[name]
            tried[name] = min(high, max(low, tried[name] * math.exp(random_numbers.gauss(0, step))))
        if (found := cost(tried)) < least:
            best, least = tried, found
        elif number >= tries // 3:
            step = max(0.03, step * 0.995)
    return best


def show(rows: Sequence[Published], start: Mapping[str, float], tries: int) -> None:
    """Fit, print each row's error with and without it, and the constants."""
    fitted = [row for row in rows if row.is_fitted]
    constants = fit(fitted, start, tries)
    print(f"{'run':<48} {'tokens/s':>9} {'planned':>9} {'step':>6} {'left out':>9}")
    unseen, others = [], []
    for row in rows:
        off = error(row, constants)
        line = f"{row.name[:47]:<48} {row.rate:>9,.0f} {planned_rate(row, constants):>9,.0f} {off:>+6.0%}"
        if row.is_fitted:
            alone = error(row, fit([other for other in fitted if other is not row], start, tries))
            unseen.append(abs(alone))
            line += f" {alone:>+9.0%}"
        else:
            others.append(abs(off))
        print(line)
    print(f"median error of {len(unseen)} rows, each left out of its fit: {statistics.median(unseen):.1%}")
    print(f"the same with {len(others)} rows that decide nothing: {statistics.median(unseen + others):.1%}")
    print(json.dumps({name: float(f"{value:.3g}") for name, value in constants.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=600, help="tried sets of constants, of each fit")
    parser.add_argument("--npu-csv", type=Path, help="measurements of MindSpeed-LLM's CI, for Ascend devices")
    parser.add_argument("--scripts", type=Path, help="folder of MindSpeed-LLM, as npu_cases.py takes it")
    wanted = parser.parse_args()
    show(read_published(), HOPPER, wanted.tries)
    if wanted.npu_csv is not None:
        show(npu_runs(wanted.npu_csv, wanted.scripts), ASCEND, wanted.tries)


if __name__ == "__main__":
    main()
