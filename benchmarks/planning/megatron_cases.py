"""GPU memory that Megatron-LM's functional tests measured, beside what the plan says of the same shapes.

    python benchmarks/planning/megatron_cases.py --csv megatron_golden.csv

Each row is a golden file of one case on one kind of GPU; its figures are those of the last rank, in steady state.
Flags that the file lacks are in megatron_cases.txt, from each case's model_config.yaml (Megatron-LM d98e8a64). What
Megatron-LM keeps and this project does not is a rule of this script: see `_layer_extra` and `_workspace`. The rules
were made without a third of the cases (`is_unseen`), whose figures are printed apart.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import hashlib
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.planning.mindspeed_ci import flags_of, number_of
from qwen3_npu.errors import UsageError
from qwen3_npu.plan.activations import MINDSPEED
from qwen3_npu.plan.memory import MASTER, MOMENTS, in_flight, stage_memory
from qwen3_npu.plan.setup import Setup
from qwen3_npu.plan.shape import Shape

MIB = 2**20
TABLE = Path(__file__).with_name("megatron_cases.txt")
_CUBLAS = 32 * MIB  # of a handle and stream, with CUBLAS_WORKSPACE_CONFIG=:4096:8, or on Hopper
_SMALL_CUBLAS = 8.125 * MIB  # PyTorch's choice on other GPUs
_STREAMS = 4  # of Transformer Engine's grouped products
_GPT2 = 50257  # tokens of GPT-2's vocabulary, which the tests use unless they say another number
_FAMILIES = {"t5", "mimo", "nemotron", "multimodal-llava"}  # no stack of equal layers, or not alone
_MISSING = {
    "fp8-format": "8-bit products",
    "use-megatron-fsdp": "FSDP",
    "use-torch-fsdp2": "FSDP",
    "multi-latent-attention": "multi-latent attention with its own kernels",
    "export-kd-teacher-load": "distillation",
    "fine-grained-activation-offloading": "offload of activations",
    "pipeline-model-parallel-layout": "pipeline layout",
    "mtp-num-layers": "prediction of later tokens",
}


@dataclasses.dataclass(frozen=True)
class Golden:
    """One row: a case's golden file.

    Attributes:
        hardware: a100, h100, gb200 or other.
        static, peak: MiB measured.
        missing: what the plan cannot say of it; "" if it can.
    """

    case: str
    file: str
    hardware: str
    static: float
    peak: float
    flags: Mapping[str, str]
    missing: str
    shape: Shape | None = None
    setup: Setup | None = None

    @property
    def is_unseen(self) -> bool:
        """Whether the case is of the third that was not looked at while rules were made; all of BERT was looked at."""
        return not self.case.startswith("bert/") and hashlib.sha256(self.case.encode()).digest()[0] % 3 == 0

    @property
    def kind(self) -> str:
        return "MoE" if self.flags.get("num-experts") else "dense"


def read_golden(path: Path) -> list[Golden]:
    """All rows of a file.

    Raises:
        UsageError: a column is missing, or a number is none.
    """
    table = (line.partition(":") for line in TABLE.read_text().splitlines())
    known = {name: flags_of(flags) for name, _, flags in table}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        needed = {"case", "file", "hw", "alloc_MiB", "max_alloc_MiB", "num-layers", "seq-length"}
        if missing := sorted(needed - set(reader.fieldnames or ())):
            raise UsageError(f"{path} has no column {', '.join(missing)}")
        return [_golden(row, known.get(row["case"]), f"{path}:{reader.line_num}") for row in reader]


def _golden(row: Mapping[str, str], known: Mapping[str, str] | None, where: str) -> Golden:
    flags = {name: "1" if value == "true" else value for name, value in row.items() if value not in ("", "false")}
    flags |= known or {}
    if (
        "dracooci" in row["file"] and "default-workspace" not in flags
    ):  # written before the tests left the choice of attention to Transformer Engine
        flags.setdefault("attention-backend", "unfused")
    try:
        measured = float(row["alloc_MiB"]), float(row["max_alloc_MiB"])
    except ValueError as error:
        raise UsageError(f"{where}: memory is no number: {error}") from error
    golden = Golden(row["case"], row["file"], row["hw"], *measured, flags=flags, missing=_missing(row["case"], flags))
    if known is None and not golden.missing:
        return dataclasses.replace(golden, missing="flags not known")
    if golden.missing:
        return golden
    try:
        shape = _shape(flags)
        return dataclasses.replace(golden, shape=shape, setup=_setup(row["case"], flags))
    except (UsageError, ValueError) as error:
        return dataclasses.replace(golden, missing=f"{where}: {error}")


def _missing(case: str, flags: Mapping[str, str]) -> str:
    family = case.partition("/")[0]
    if family in _FAMILIES:
        return f"family {family}"
    for flag, words in _MISSING.items():
        if flag in flags:
            return words
    return "number of devices not recorded" if "_release" in case else ""


def _shape(flags: Mapping[str, str]) -> Shape:
    hidden, heads = number_of(flags, "hidden-size"), number_of(flags, "num-attention-heads")
    ffn, each = number_of(flags, "ffn-hidden-size"), number_of(flags, "make-vocab-size-divisible-by", 128)
    is_gated = "swiglu" in flags
    ffn = ffn or (int(4 * hidden * 2 / 3 / 64) * 64 if is_gated else 4 * hidden)  # as Megatron-LM's validate_args
    each *= number_of(flags, "tensor-model-parallel-size", 1)
    experts = number_of(flags, "num-experts")
    pattern = flags.get("moe-layer-freq", "")
    leading = re.match(r"\(?\[0\]\*(\d+)\+\[1\]\*\d+\)?$", pattern)
    if pattern and not leading:
        raise UsageError(f"--moe-layer-freq {pattern} is not understood")
    return Shape(
        num_layers=number_of(flags, "num-layers"),
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=number_of(flags, "num-query-groups", heads) if "group-query-attention" in flags else heads,
        head_dim=number_of(flags, "kv-channels", hidden // heads),
        vocab_size=-(-number_of(flags, "vocab-size", _GPT2) // each) * each,
        tied="untie-embeddings-and-output-weights" not in flags,
        gated=is_gated,
        num_experts=experts,
        moe_topk=number_of(flags, "moe-router-topk", 2) if experts else 0,
        moe_ffn_hidden_size=number_of(flags, "moe-ffn-hidden-size", ffn) if experts else 0,
        moe_dense_layers=int(leading[1]) if leading else 0,
        moe_shared_ffn=number_of(flags, "moe-shared-expert-intermediate-size"),
        qk_norm="qk-layernorm" in flags,
        biases="disable-bias-linear" not in flags,
        positions=0 if "position-embedding-type" in flags else number_of(flags, "seq-length"),
        norm_vectors=1 if flags.get("normalization") == "RMSNorm" else 2,
    )


def _setup(case: str, flags: Mapping[str, str]) -> Setup:
    tp, pp = number_of(flags, "tensor-model-parallel-size", 1), number_of(flags, "pipeline-model-parallel-size", 1)
    cp, micro = number_of(flags, "context-parallel-size", 1), number_of(flags, "micro-batch-size", 1)
    devices = 4 if "1node" in case else 8  # a node of GB200 has four; the other tests use eight GPUs
    data = devices // (tp * pp * cp)
    if data < 1:
        raise UsageError(f"{case} needs more than {devices} devices")
    layers = _layers(flags, pp)
    is_full, block = flags.get("recompute-granularity") == "full", flags.get("recompute-method") == "block"
    per_stage = max(map(sum, layers))
    group = number_of(flags, "recompute-num-layers", 1)
    return Setup(
        tensor=tp,
        pipeline=pp,
        context=cp,
        expert=number_of(flags, "expert-model-parallel-size", 1),
        expert_tensor=number_of(flags, "expert-tensor-parallel-size", tp),
        data=data // number_of(flags, "num-distributed-optimizer-instances", 1),
        layers=layers,
        seq_length=number_of(flags, "seq-length"),
        micro_batch=micro,
        num_microbatches=max(1, number_of(flags, "global-batch-size", 1) // (data * micro)),
        sequence_parallel="sequence-parallel" in flags and tp > 1,
        ring=True,
        distributed_optimizer="use-distributed-optimizer" in flags,
        bf16="bf16" in flags or "fp16" in flags,
        fp16="fp16" in flags,
        muon=flags.get("optimizer") == "muon",
        recompute=(min(per_stage, group) if block else per_stage) if is_full else 0,
        recompute_group=1 if block or not is_full else group,
        recompute_attention=True,  # what attention keeps is a rule of this script
    )


def _layers(flags: Mapping[str, str], pp: int) -> tuple[tuple[int, ...], ...]:
    """Layers of each chunk of each stage; the embedding and the loss can count as one layer each."""
    ends = ("account-for-embedding-in-pipeline-split" in flags, "account-for-loss-in-pipeline-split" in flags)
    total = number_of(flags, "num-layers") + sum(ends)
    first, last = (number_of(flags, f"decoder-{end}-pipeline-num-layers") for end in ("first", "last"))
    if first or last:
        middle = (total - first - last) // (pp - bool(first) - bool(last))
        return tuple((first or middle if s == 0 else last or middle if s == pp - 1 else middle,) for s in range(pp))
    virtual = number_of(flags, "num-virtual-stages-per-pipeline-rank", 1)
    if "num-layers-per-virtual-pipeline-stage" in flags and pp > 1:
        virtual = total // pp // number_of(flags, "num-layers-per-virtual-pipeline-stage")
    chunks = [[total // (pp * virtual)] * virtual for _ in range(pp)]
    chunks[0][0] -= ends[0]
    chunks[-1][-1] -= ends[1]
    return tuple(map(tuple, chunks))


def planned(golden: Golden) -> tuple[float, float]:
    """MiB that the plan, with this script's rules, expects of the last rank after a step, and at its peak."""
    assert golden.shape is not None
    assert golden.setup is not None
    shape, setup, stage = golden.shape, golden.setup, golden.setup.pipeline - 1
    memory = stage_memory(shape, setup, stage, kernels=MINDSPEED)
    static = memory.static + _workspace(golden) + _head(golden)
    kinds = setup.layer_kinds(shape, stage)
    extra = sum(_layer_extra(golden, has_experts) * count for has_experts, count in kinds.items())
    number = sum(kinds.values())
    share = max(0, number - setup.recompute) / max(1, number)
    kept = in_flight(setup, stage) * share * extra / setup.virtual + memory.layers
    # Of the last stage's chunks all but the last one wait for a group of micro-batches, whatever layers they have.
    group = number_of(golden.flags, "microbatch-group-size-per-virtual-pipeline-stage", setup.pipeline)
    *earlier, last = setup.layers[stage]
    if earlier:
        kept *= (group * sum(earlier) + last) / (in_flight(setup, stage) * number / setup.virtual)
    peak = static + memory.activations - memory.layers + memory.communication + kept + _loss_extra(shape, setup, golden)
    # Megatron-LM frees neither what the last micro-batch brought into each chunk, nor its gradient.
    received = 2.0 * setup.virtual * setup.residual_bytes * shape.hidden_size * setup.sharded_tokens
    return (static + (received if setup.pipeline > 1 else 0.0)) / MIB, peak / MIB


def _workspace(golden: Golden) -> float:
    """Bytes of cuBLAS for two handles of PyTorch, and for Transformer Engine's products; and the buffer "mpu" of
    Megatron-LM's own attention, which holds the scores of a layer as long as the process lives."""
    assert golden.shape is not None
    assert golden.setup is not None
    shape, setup = golden.shape, golden.setup
    is_small = "default-workspace" in golden.flags and golden.hardware != "h100"
    held = 2.0 * (_SMALL_CUBLAS if is_small else _CUBLAS)
    is_local = golden.flags.get("transformer-impl") == "local"
    if is_local:
        scores = shape.num_attention_heads / setup.tensor * setup.tokens * setup.seq_length
        held += scores * setup.weight_bytes
    engine = 4 * MIB if golden.hardware in ("a100", "other") else 32 * MIB  # get_cublas_workspace_size_bytes
    if not is_local or shape.is_moe:  # experts of the tests are Transformer Engine's
        held += engine * (1 + (_STREAMS if "moe-grouped-gemm" in golden.flags else 0))
    return held


def _head(golden: Golden) -> float:
    """Bytes of BERT's head: two products of the hidden state, equal on all tensor-parallel ranks."""
    assert golden.shape is not None
    assert golden.setup is not None
    copies = golden.setup.data * golden.setup.context if golden.setup.distributed_optimizer else 1
    weights = 2.0 * golden.shape.hidden_size**2 if golden.case.startswith("bert/") else 0.0
    return weights * (6 + (MASTER + MOMENTS) / copies)


def _loss_extra(shape: Shape, setup: Setup, golden: Golden) -> float:
    """Bytes of the loss beyond the plan's: the fused one keeps another float32 copy of the logits; a product of the
    output layer's weight gradient that is put off keeps its two inputs."""
    logits = setup.tokens * shape.vocab_size / setup.tensor
    extra = 4 * logits if "cross-entropy-loss-fusion" in golden.flags else 0.0
    if "defer-embedding-wgrad-compute" in golden.flags:
        passes = number_of(golden.flags, "wgrad-deferral-limit") or setup.num_microbatches
        extra += passes * setup.weight_bytes * (logits + setup.sharded_tokens * shape.hidden_size)
    return extra


def _layer_extra(golden: Golden, has_experts: bool) -> float:
    """Bytes that a layer keeps beyond the plan's: masks of dropout, and attention's scores.

    As Korthikanti et al., arXiv:2205.05198, section 4.1: a mask has one byte a number; without a fused kernel attention
    keeps the softmax, its mask and the dropped softmax of each pair of tokens.
    """
    assert golden.shape is not None
    assert golden.setup is not None
    shape, setup, flags = golden.shape, golden.setup, golden.flags
    hidden_drop, drop = (float(flags.get(f"{name}-dropout", 0.1)) > 0 for name in ("hidden", "attention"))
    extra = 2.0 * shape.hidden_size * setup.sharded_tokens if hidden_drop else 0.0
    heads = shape.num_attention_heads / setup.tensor
    if flags.get("attention-backend") in ("unfused", "local") or flags.get("transformer-impl") == "local":
        width = setup.weight_bytes
        return extra + heads * setup.tokens * setup.seq_length * (2 * width + 1 if drop else width)
    return extra + 4 * heads * setup.tokens


def _share(rows: list[tuple[Golden, float, float]], words: str) -> str:
    if not rows:
        return f"{words}: no rows"
    static = sum(abs(error) <= 0.02 for _, error, _ in rows) / len(rows)
    peaks = sum(abs(error) <= 0.1 for _, _, error in rows) / len(rows)
    return f"{words}: {len(rows)} rows, static within 2 % {static:.0%}, peak within 10 % {peaks:.0%}"


def errors(rows: list[Golden]) -> Iterator[tuple[Golden, float, float]]:
    """Each row that the plan can express, with its relative errors: static bytes, and peak."""
    for row in rows:
        if not row.missing:
            static, peak = planned(row)
            yield row, static / row.static - 1, peak / row.peak - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="rows of the golden files")
    parser.add_argument("--seen", action="store_true", help="show no row of unseen cases")
    wanted = parser.parse_args()
    rows = read_golden(wanted.csv)
    found = list(errors(rows))
    case = ""
    for row, static, peak in found:
        if wanted.seen and row.is_unseen:
            continue
        if row.case != case:
            case = row.case
            print(f"{case}{' (unseen)' if row.is_unseen else ''}")
        name = row.file.removeprefix("golden_values_").removesuffix(".json")
        print(f"    {name:<32}{row.static:>10,.1f}{static:>+8.1%}{row.peak:>10,.1f}{peak:>+8.1%}")
    print(f"{len(rows)} rows of {len({row.case for row in rows})} cases")
    for words, number in collections.Counter(row.missing for row in rows if row.missing).most_common():
        print(f"  not expressible: {number} rows, {words}")
    for unseen, words in ((False, "seen"), (True, "unseen")):
        part = [each for each in found if each[0].is_unseen == unseen]
        print(_share(part, f"{words} cases"))
        for kind in ("dense", "MoE"):
            print(_share([each for each in part if each[0].kind == kind], f"  {kind}"))
        for hardware in sorted({row.hardware for row in rows}):
            print(_share([each for each in part if each[0].hardware == hardware], f"  {hardware}"))


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(f"error: {error}")
