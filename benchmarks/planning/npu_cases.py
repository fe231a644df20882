"""Memory and step times that MindSpeed-LLM's CI measured on NPUs, beside what the plan says of the same shapes.

    python benchmarks/planning/npu_cases.py --csv mindspeed_ci.csv [--scripts FOLDER OF MindSpeed-LLM]

The file has a row for each rank (mindspeed_ci.py reads it). Its memory is of the first iteration: when activations
peak, Adam's moments do not exist yet; when they do, the update holds a float32 copy of one tensor at a time (in two
thirds of the cases; the others show nothing of that kind, and no flag tells which).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.planning.mindspeed_ci import NpuCase, read_cases, stage_of
from qwen3_npu.plan.activations import MINDSPEED
from qwen3_npu.plan.device import DEVICE_SPECS
from qwen3_npu.plan.memory import MOMENTS, gathered_bytes, in_flight, sharded_bytes, stage_memory
from qwen3_npu.plan.parameters import embedding_count, layer_counts, trained_counts
from qwen3_npu.plan.timing import step_time

MIB = 2**20
_WORKSPACE = 16 * MIB  # the least difference between both figures in every case
_BUCKET = 40_000_000  # weights of a bucket of gradients that is reduced while backward runs (megatron-core)


def first_iteration(case: NpuCase, stage: int) -> tuple[float, float]:
    """Planned MiB after the first iteration, and most MiB in it."""
    assert case.shape is not None
    assert case.setup is not None
    shape, setup = case.shape, case.setup
    memory = stage_memory(shape, setup, stage, kernels=MINDSPEED)
    trained = trained_counts(shape, setup, stage)
    moments = 0.0 if setup.swap_optimizer else sharded_bytes(setup, trained, MOMENTS)
    before = memory.static - moments + memory.activations + memory.communication + _unfused(case, stage)
    copied = 0.0 if setup.lora_rank else 4.0 * max(_pieces(case, stage), default=0)
    kept = _kept_masks(case, stage) + (_rows_bytes(case) if "tp-2d" in case.flags else gathered_bytes(shape, setup))
    after = memory.static + kept + _received(case, stage)
    return after / MIB, (max(before + kept, after + copied) + _WORKSPACE) / MIB


def _unfused(case: NpuCase, stage: int) -> float:
    """Bytes that norms made of single operations keep beyond the kernels of torch_npu."""
    assert case.shape is not None
    assert case.setup is not None
    shape, setup, flags = case.shape, case.setup, case.flags
    # A vector, and itself over its length, in float32; not the vector in 16 bits.
    one = 6.0 * shape.hidden_size * setup.sharded_tokens
    norm = one if flags.get("normalization") == "RMSNorm" and "use-fused-rmsnorm" not in flags else 0.0
    layers = max(0, sum(setup.layers[stage]) - setup.recompute) / setup.virtual
    last = norm if stage == setup.pipeline - 1 else 0.0
    return in_flight(setup, stage) * layers * 2 * norm + last


def _received(case: NpuCase, stage: int) -> float:
    """Bytes of what the last micro-batch brought into each chunk, and of its gradient, which no one has freed."""
    assert case.shape is not None
    assert case.setup is not None
    setup = case.setup
    chunks = setup.virtual - (stage == 0) if setup.pipeline > 1 else 0
    return 2.0 * chunks * setup.residual_bytes * case.shape.hidden_size * setup.sharded_tokens


def _rows_bytes(case: NpuCase) -> float:
    """Bytes of the buffer in which two-dimensional tensor parallelism gathers gradients of the MLP's first product."""
    assert case.shape is not None
    assert case.setup is not None
    width = case.shape.gate_factor * case.shape.ffn_hidden_size / int(case.flags["tp-x"])
    return case.setup.tokens * width * case.setup.weight_bytes


def _kept_masks(case: NpuCase, stage: int) -> float:
    """Bytes of ALiBi: its scores twice, once for each sample, and a mask of each layer."""
    if "square-alibi-mask" not in case.flags:
        return 0.0
    assert case.shape is not None
    assert case.setup is not None
    setup, square = case.setup, float(case.setup.seq_length) ** 2
    heads = case.shape.num_attention_heads / setup.tensor
    return square * (heads * setup.weight_bytes * (2 + setup.micro_batch) + sum(setup.layers[stage]))


def _pieces(case: NpuCase, stage: int) -> Iterator[float]:
    """Weights of each gradient that the first data-parallel rank's optimizer has: its shard of each bucket."""
    assert case.setup is not None
    setup = case.setup
    dense, expert = _tensors(case, stage)
    for tensors, copies in ((dense, setup.data * setup.context), (expert, setup.expert_data)):
        copies = copies if setup.distributed_optimizer else 1
        for bucket in _buckets(tensors, setup.overlap_grads):
            room = sum(bucket) / copies
            for size in bucket:
                yield min(size, room)
                room -= min(size, room)


def _buckets(tensors: list[float], several: bool) -> Iterator[list[float]]:
    bucket: list[float] = []
    for size in reversed(tensors):  # gradients come last to first
        bucket.append(size)
        if several and sum(bucket) >= _BUCKET:
            yield bucket
            bucket = []
    yield bucket


def _tensors(case: NpuCase, stage: int) -> tuple[list[float], list[float]]:
    """Weights of each tensor of a stage, in the order in which a model has them: shared ones, and experts."""
    assert case.shape is not None
    assert case.setup is not None
    shape, setup = case.shape, case.setup
    h, tp = shape.hidden_size, setup.tensor
    dense: list[float] = [embedding_count(shape, setup)] if stage == 0 else []
    experts: list[float] = []
    for has_experts, number in sorted(setup.layer_kinds(shape, stage).items()):
        counts = layer_counts(shape, setup, has_experts)
        attention = shape.output_width * h / tp
        ffn = h * shape.ffn_hidden_size / tp
        mlp = [] if has_experts else [shape.gate_factor * ffn, ffn]
        dense += [attention, counts.dense - attention - sum(mlp), *mlp] * number
        together = "moe-grouped-gemm" in case.flags
        share = counts.expert / (1 if together else max(1, shape.num_experts // setup.expert)) / (shape.gate_factor + 1)
        experts += [share * shape.gate_factor, share] * number if has_experts else []
    if stage == setup.pipeline - 1 and not (shape.tied and setup.pipeline == 1):
        dense.append(embedding_count(shape, setup))
    return dense, experts


def planned_seconds(case: NpuCase, constants: Mapping[str, float] | None = None) -> float:
    """Seconds of a step on one node of 910B, by the table of devices with `constants` in place of its own."""
    assert case.shape is not None
    assert case.setup is not None
    name = "910C-64G" if "A3" in case.name else "910B-64G"
    device = dataclasses.replace(DEVICE_SPECS[name], **(constants or {}))  # type: ignore[arg-type]
    return step_time(case.shape, case.setup, device).total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="rows of the CI, one a rank")
    parser.add_argument("--scripts", type=Path, help="folder of MindSpeed-LLM, to read flags that the file lacks")
    wanted = parser.parse_args()
    static: list[float] = []
    peaks: list[float] = []
    expressible: list[bool] = []
    rows = 0
    print(f"{'case':<48}{'rank':>5}{'MiB':>10}{'planned':>9}{'peak':>10}{'planned':>9}{'step':>9}{'planned':>9}")
    for case in read_cases(wanted.csv, wanted.scripts):
        rows += len(case.measured)
        if case.shape is None:
            print(f"{case.name[:47]:<48}not modelled: {case.missing}")
            continue
        said = None
        for rank, (after, most) in case.measured.items():
            planned, peak = first_iteration(case, stage_of(case, rank))
            static.append(planned / after - 1)
            peaks.append(peak / most - 1)
            expressible.append(not case.missing)
            if (round(after), round(most)) != said:
                said = round(after), round(most)
                print(
                    f"{case.name[:47]:<48}{rank:>5}{after:>10,.0f}{static[-1]:>+9.1%}{most:>10,.0f}{peaks[-1]:>+9.1%}"
                    f"{case.seconds:>8.2f}s{planned_seconds(case) / (case.seconds or 1) - 1:>+9.0%}  {case.missing}"
                )
    for name, errors, limit in (("static bytes", static, 0.02), ("peak", peaks, 0.1)):
        within = sum(abs(error) <= limit for error in errors)
        modelled = [abs(error) for error, is_modelled in zip(errors, expressible, strict=True) if is_modelled]
        good = sum(error <= limit for error in modelled)
        print(
            f"{name}: {within} of {rows} ranks within {limit:.0%} ({within / rows:.0%}); of {len(modelled)} that the "
            f"plan can express {good} ({good / len(modelled):.0%}), median {statistics.median(modelled):.1%}"
        )


if __name__ == "__main__":
    main()
