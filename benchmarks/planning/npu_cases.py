"""Memory and step times that MindSpeed-LLM's CI measured on NPUs, beside what the plan says of the same shapes.

    python benchmarks/planning/npu_cases.py --csv mindspeed_ci.csv [--scripts FOLDER OF MindSpeed-LLM]

The file has a row for each rank; what its columns do not say is in mindspeed_cases.txt, or is read from the script that
a row names, if --scripts is given. Its memory is of the first iteration: when activations peak, Adam's moments do not
exist yet; when they do, the update holds a float32 copy of one tensor at a time (in two thirds of the cases; the others
show nothing of that kind, and no flag tells which).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import re
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qwen3_npu.errors import UsageError
from qwen3_npu.plan.activations import MINDSPEED
from qwen3_npu.plan.device import DEVICE_SPECS
from qwen3_npu.plan.memory import MOMENTS, gathered_bytes, sharded_bytes, stage_memory
from qwen3_npu.plan.parameters import embedding_count, layer_counts, trained_counts
from qwen3_npu.plan.setup import Setup
from qwen3_npu.plan.shape import Shape
from qwen3_npu.plan.timing import step_time

MIB = 2**20
TABLE = Path(__file__).with_name("mindspeed_cases.txt")
# What neither `Shape` nor `Setup` can say.
NOT_MODELLED = {
    "tp-2d": "tensor parallelism in two dimensions",
    "enable-dsa-indexer": "sparse attention",
    "linear-key-head-dim": "linear attention",
    "mamba-num-groups": "state space layers",
    "square-alibi-mask": "a mask that is kept",
    "moe-zero-memory": "experts that keep nothing",
}
_VOCABULARIES = {"llama3": 128256, "baichuan2": 125696, "gpt": 50257}  # of models whose script does not say it
_WORKSPACE = 16 * MIB  # the least difference between both figures in every case
_TUNED_LENGTH = 512  # tokens of the longest sample of Alpaca that a step of 16 or 32 samples meets, about
_BUCKET = 40_000_000  # weights of a bucket of gradients that is reduced while backward runs (megatron-core)


@dataclasses.dataclass(frozen=True)
class NpuCase:
    """One case of the CI.

    Attributes:
        measured: rank -> MiB after the first iteration, and most MiB.
        seconds: of a step, the median; 0: not measured.
        missing: what the plan cannot say of it; "" if it can.
    """

    name: str
    shape: Shape | None
    setup: Setup | None
    flags: Mapping[str, str]
    measured: Mapping[int, tuple[float, float]]
    seconds: float
    missing: str


def flags_of(text: str) -> dict[str, str]:
    """`--name value` of a shell script, with its variables' values; a flag without a value is "1"."""
    variables = dict(re.findall(r"^\s*(?:export )?([A-Z_0-9]+)=[\"']?([^\s\"'#]+)", text, re.M))
    found: dict[str, str] = {}
    for name, value in re.findall(r"(?<![\w-])--([a-z0-9][\w-]*)(?:[ =]+(?!--)([^\s\\]+))?", text):
        value = re.sub(r"\$\{?([A-Z_0-9]+)\}?", lambda match: variables.get(match[1], ""), value).strip("\"')")
        found[name] = value or "1"
    return found


def read_cases(path: Path, scripts: Path | None = None) -> list[NpuCase]:
    """All cases of a file."""
    known = {}
    for line in TABLE.read_text().splitlines():
        name, _, flags = line.partition(":")
        known[name] = flags_of(flags)
    rows: dict[str, list[dict[str, str]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            rows.setdefault(row["case"], []).append(row)
    return [_case(name, ranks, known.get(name, {}), scripts) for name, ranks in rows.items()]


def _case(name: str, rows: list[dict[str, str]], known: dict[str, str], scripts: Path | None) -> NpuCase:
    flags = {column: value for column, value in rows[0].items() if value not in ("", "0")} | known
    if scripts is not None and rows[0]["script"] and (scripts / rows[0]["script"]).is_file():
        flags = {**flags_of((scripts / rows[0]["script"]).read_text()), **flags}
    measured = {int(row["rank"]): (float(row["alloc_MiB"]), float(row["max_alloc_MiB"])) for row in rows}
    seconds = float(rows[0]["ms_per_iter_median"] or 0) / 1000
    missing = ", ".join(words for flag, words in NOT_MODELLED.items() if flag in flags)
    shape = setup = None
    if "num-layers" not in flags:
        missing = "its flags"
    else:
        try:
            shape = _shape(name, flags)
            setup = _setup(flags, shape)
        except UsageError as error:
            missing = str(error)
    return NpuCase(name, shape, setup, flags, measured, seconds=seconds, missing=missing)


def _number(flags: Mapping[str, str], name: str, default: int = 0) -> int:
    return int(float(flags.get(name, default)))


def _shape(name: str, flags: Mapping[str, str]) -> Shape:
    hidden, heads = _number(flags, "hidden-size"), _number(flags, "num-attention-heads")
    ffn = _number(flags, "ffn-hidden-size", 4 * hidden)
    experts = _number(flags, "num-experts")
    moe_ffn = _number(flags, "moe-ffn-hidden-size", _number(flags, "moe-intermediate-size", ffn))
    vocabulary = next((size for model, size in _VOCABULARIES.items() if model in name), 32000)
    each = _number(flags, "make-vocab-size-divisible-by", 128) * _number(flags, "tensor-model-parallel-size", 1)
    latent = {}
    if "multi-latent-attention" in flags:
        for size in ("kv-lora-rank", "q-lora-rank", "qk-head-dim", "qk-pos-emb-head-dim", "v-head-dim"):
            latent[size.replace("-", "_")] = _number(flags, size)
    return Shape(
        num_layers=_number(flags, "num-layers") - len(_noop(flags)),
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=_number(flags, "num-query-groups", heads),
        head_dim=_number(flags, "kv-channels", hidden // heads),
        vocab_size=_number(flags, "padded-vocab-size") or -(-vocabulary // each) * each,
        tied="untie-embeddings-and-output-weights" not in flags,
        gated="gelu" not in flags,
        num_experts=experts,
        moe_topk=_number(flags, "moe-router-topk"),
        moe_ffn_hidden_size=moe_ffn if experts else 0,
        moe_dense_layers=max(0, _number(flags, "first-k-dense-replace")),
        moe_shared_ffn=_number(flags, "moe-shared-expert-intermediate-size")
        or _number(flags, "n-shared-experts") * moe_ffn,
        qk_norm="qk-layernorm" in flags or "qwen3" in name,
        qkv_bias="add-qkv-bias" in flags,
        mtp_layers=_number(flags, "mtp-num-layers"),
        **latent,
    )


def _noop(flags: Mapping[str, str]) -> list[int]:
    return [int(number) for number in flags.get("noop-layers", "").split(",") if number]


def _setup(flags: Mapping[str, str], shape: Shape) -> Setup:
    tp, pp = _number(flags, "tensor-model-parallel-size", 1), _number(flags, "pipeline-model-parallel-size", 1)
    cp, micro = _number(flags, "context-parallel-size", 1), _number(flags, "micro-batch-size", 1)
    data = max(1, _number(flags, "npus_per_node", 8) // (tp * pp * cp))
    stages = _chunks(flags, pp)
    per_stage = max(map(sum, stages))
    recompute, granularity = 0, flags.get("recompute-granularity")
    if granularity == "full":
        each = len(stages[0]) if "enable-recompute-layers-per-pp-rank" not in flags else 1
        is_block = flags.get("recompute-method") == "block"
        recompute = min(per_stage, _number(flags, "recompute-num-layers", 1) * each) if is_block else per_stage
    length = _number(flags, "seq-length")
    if flags.get("stage") in ("sft", "dpo") and "pad-to-seq-lengths" not in flags:
        length = min(length, _TUNED_LENGTH)
    pads = "moe-pad-expert-input-to-capacity" in flags
    preference = 2 if flags.get("stage") == "dpo" else 1
    return Setup(
        tensor=tp,
        pipeline=pp,
        context=cp,
        expert=_number(flags, "expert-model-parallel-size", 1),
        expert_tensor=_number(flags, "expert-tensor-parallel-size", tp),
        data=data,
        layers=stages,
        seq_length=length,
        micro_batch=micro * preference,
        num_microbatches=max(1, _number(flags, "global-batch-size", 1) // (data * micro)),
        sequence_parallel="sequence-parallel" in flags and tp > 1,
        ring=flags.get("context-parallel-algo") == "megatron_cp_algo",
        distributed_optimizer="use-distributed-optimizer" in flags,
        recompute=recompute,
        recompute_activation="recompute-activation-function" in flags,
        recompute_experts={"": 0, "level0": 1}.get(flags.get("moe-zero-memory", ""), 2),
        expert_capacity=float(flags.get("moe-expert-capacity-factor", 1)) if pads else 1.0,
        recompute_norm="recompute-norm" in flags,
        swapped=("self_attention",) if "swap-attention" in flags else (),
        swapped_layers=per_stage,
        lora_rank=_number(flags, "lora-r"),
        reuse_master="reuse-fp32-param" in flags,
        swap_optimizer="swap-optimizer" in flags,
        overlap_grads="overlap-grad-reduce" in flags,
        overlap_params="overlap-param-gather" in flags,
        reference=preference == 2,
        fp16="fp16" in flags,
    )


def _chunks(flags: Mapping[str, str], pp: int) -> tuple[tuple[int, ...], ...]:
    if "num-layer-list" in flags:
        return tuple((int(number),) for number in flags["num-layer-list"].split(","))
    layers, noop = _number(flags, "num-layers"), _noop(flags)
    per_stage = layers // pp
    each = _number(flags, "num-layers-per-virtual-pipeline-stage", per_stage) if pp > 1 else per_stage
    chunks = max(1, per_stage // each)
    return tuple(
        tuple(sum((chunk * pp + stage) * each + layer not in noop for layer in range(each)) for chunk in range(chunks))
        for stage in range(pp)
    )


def first_iteration(case: NpuCase, stage: int) -> tuple[float, float]:
    """Planned MiB after the first iteration, and most MiB in it."""
    assert case.shape is not None
    assert case.setup is not None
    shape, setup = case.shape, case.setup
    memory = stage_memory(shape, setup, stage, kernels=MINDSPEED)
    trained = trained_counts(shape, setup, stage)
    moments = 0.0 if setup.swap_optimizer else sharded_bytes(setup, trained, MOMENTS)
    before = memory.static - moments + memory.activations + memory.communication
    copied = 0.0 if setup.lora_rank else 4.0 * max(_pieces(case, stage), default=0)
    after = memory.static + gathered_bytes(shape, setup)
    return after / MIB, (max(before, after + copied) + _WORKSPACE) / MIB


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


def stage_of(case: NpuCase, rank: int) -> int:
    assert case.setup is not None
    return rank // max(1, case.setup.devices // case.setup.pipeline)


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
