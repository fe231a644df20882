"""The cases of MindSpeed-LLM's CI: what they measured, and the shape and the setup that their flags describe.

What the columns of its file do not say is in mindspeed_cases.txt, or is read from the script that a row names. A line
of the table may be of some ranks alone (`case@1-6: FLAGS`), whose flags are others than those of the rest.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from qwen3_npu.errors import UsageError
from qwen3_npu.plan.setup import Setup
from qwen3_npu.plan.shape import Shape

TABLE = Path(__file__).with_name("mindspeed_cases.txt")
# What neither `Shape` nor `Setup` can say.
NOT_MODELLED = {
    "enable-dsa-indexer": "sparse attention",
    "linear-key-head-dim": "linear attention",
    "mamba-num-groups": "state space layers",
}
_VOCABULARIES = {"llama3": 128256, "baichuan2": 125696, "gpt": 50257}  # of models whose script does not say it
_TUNED_LENGTH = 512  # tokens of the longest sample of Alpaca that a step of 16 or 32 samples meets, about


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
    rows: dict[str, list[dict[str, str]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            rows.setdefault(row["case"], []).append(row)
    return [case for name, ranks in rows.items() for case in _parts(name, ranks, _known_flags(), scripts)]


def _known_flags() -> dict[str, dict[str, str]]:
    lines = (line.partition(":") for line in TABLE.read_text().splitlines())
    return {name: flags_of(flags) for name, _, flags in lines}


def _parts(
    name: str, rows: list[dict[str, str]], known: Mapping[str, dict[str, str]], scripts: Path | None
) -> Iterator[NpuCase]:
    """A case, or each group of its ranks that has flags of its own."""
    groups = [key for key in known if key.startswith(f"{name}@")]
    for key in groups:
        first, last = map(int, key.rpartition("@")[2].split("-"))
        yield _case(key, [row for row in rows if first <= int(row["rank"]) <= last], known[key], None)
    if not groups:
        yield _case(name, rows, known.get(name, {}), scripts)


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
            shape = setup = None
            missing = str(error)
    return NpuCase(name, shape, setup, flags, measured, seconds=seconds, missing=missing)


def number_of(flags: Mapping[str, str], name: str, default: int = 0) -> int:
    """The number behind a flag."""
    return int(float(flags.get(name, default)))


def _shape(name: str, flags: Mapping[str, str]) -> Shape:
    hidden, heads = number_of(flags, "hidden-size"), number_of(flags, "num-attention-heads")
    ffn = number_of(flags, "ffn-hidden-size", 4 * hidden)
    experts = number_of(flags, "num-experts")
    moe_ffn = number_of(flags, "moe-ffn-hidden-size", number_of(flags, "moe-intermediate-size", ffn))
    vocabulary = next((size for model, size in _VOCABULARIES.items() if model in name), 32000)
    each = number_of(flags, "make-vocab-size-divisible-by", 128) * number_of(flags, "tensor-model-parallel-size", 1)
    latent = {}
    if "multi-latent-attention" in flags:
        for size in ("kv-lora-rank", "q-lora-rank", "qk-head-dim", "qk-pos-emb-head-dim", "v-head-dim"):
            latent[size.replace("-", "_")] = number_of(flags, size)
    return Shape(
        num_layers=number_of(flags, "num-layers") - len(_noop(flags)),
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=number_of(flags, "num-query-groups", heads),
        head_dim=number_of(flags, "kv-channels", hidden // heads),
        vocab_size=number_of(flags, "padded-vocab-size") or -(-vocabulary // each) * each,
        tied="untie-embeddings-and-output-weights" not in flags,
        gated="gelu" not in flags,
        num_experts=experts,
        moe_topk=number_of(flags, "moe-router-topk"),
        moe_ffn_hidden_size=moe_ffn if experts else 0,
        moe_dense_layers=max(0, number_of(flags, "first-k-dense-replace")),
        moe_shared_ffn=number_of(flags, "moe-shared-expert-intermediate-size")
        or number_of(flags, "n-shared-experts") * moe_ffn,
        qk_norm="qk-layernorm" in flags or "qwen3" in name,
        qkv_bias="add-qkv-bias" in flags,
        mtp_layers=number_of(flags, "mtp-num-layers"),
        **latent,
    )


def _noop(flags: Mapping[str, str]) -> list[int]:
    return [int(number) for number in flags.get("noop-layers", "").split(",") if number]


def _setup(flags: Mapping[str, str], shape: Shape) -> Setup:
    tp, pp = number_of(flags, "tensor-model-parallel-size", 1), number_of(flags, "pipeline-model-parallel-size", 1)
    cp, micro = number_of(flags, "context-parallel-size", 1), number_of(flags, "micro-batch-size", 1)
    data = max(1, number_of(flags, "npus_per_node", 8) // (tp * pp * cp))
    stages = _chunks(flags, pp)
    per_stage = max(map(sum, stages))
    recompute, granularity = 0, flags.get("recompute-granularity")
    if granularity == "full":
        each = len(stages[0]) if "enable-recompute-layers-per-pp-rank" not in flags else 1
        is_block = flags.get("recompute-method") == "block"
        recompute = min(per_stage, number_of(flags, "recompute-num-layers", 1) * each) if is_block else per_stage
    length = number_of(flags, "seq-length")
    if flags.get("stage") in ("sft", "dpo") and "no-pad-to-seq-lengths" in flags:
        length = min(length, _TUNED_LENGTH)
    pads = "moe-pad-expert-input-to-capacity" in flags
    preference = 2 if flags.get("stage") == "dpo" else 1
    return Setup(
        tensor=tp,
        pipeline=pp,
        context=cp,
        expert=number_of(flags, "expert-model-parallel-size", 1),
        expert_tensor=number_of(flags, "expert-tensor-parallel-size", tp),
        data=data,
        layers=stages,
        seq_length=length,
        micro_batch=micro * preference,
        num_microbatches=max(1, number_of(flags, "global-batch-size", 1) // (data * micro)),
        # Tensor parallelism in two dimensions shards sequences, too: along one, and the hidden state along the other.
        sequence_parallel=("sequence-parallel" in flags or "tp-2d" in flags) and tp > 1,
        ring=flags.get("context-parallel-algo") == "megatron_cp_algo",
        distributed_optimizer="use-distributed-optimizer" in flags,
        recompute=recompute,
        recompute_activation="recompute-activation-function" in flags,
        recompute_experts={"": 0, "level0": 1}.get(flags.get("moe-zero-memory", ""), 2),
        expert_capacity=float(flags.get("moe-expert-capacity-factor", 1)) if pads else 1.0,
        recompute_norm="recompute-norm" in flags,
        swapped=("self_attention",) if "swap-attention" in flags else (),
        swapped_layers=per_stage,
        lora_rank=number_of(flags, "lora-r"),
        reuse_master="reuse-fp32-param" in flags,
        swap_optimizer="swap-optimizer" in flags,
        overlap_grads="overlap-grad-reduce" in flags,
        overlap_params="overlap-param-gather" in flags,
        overlap_tensor="use-ascend-mc2" in flags or "use-ascend-coc" in flags,
        fused_tensor="use-ascend-mc2" in flags or "coc-fused-kernel" in flags,
        overlap_experts="moe-alltoall-overlap-comm" in flags,
        gathered=flags.get("moe-token-dispatcher-type") == "allgather",
        reference=preference == 2,
        fp16="fp16" in flags,
    )


def _chunks(flags: Mapping[str, str], pp: int) -> tuple[tuple[int, ...], ...]:
    if "num-layer-list" in flags:
        return tuple((int(number),) for number in flags["num-layer-list"].split(","))
    layers, noop = number_of(flags, "num-layers"), _noop(flags)
    per_stage = layers // pp
    each = number_of(flags, "num-layers-per-virtual-pipeline-stage", per_stage) if pp > 1 else per_stage
    chunks = max(1, per_stage // each)
    return tuple(
        tuple(sum((chunk * pp + stage) * each + layer not in noop for layer in range(each)) for chunk in range(chunks))
        for stage in range(pp)
    )


def stage_of(case: NpuCase, rank: int) -> int:
    """The pipeline stage of a rank; `rank-offset`: so many ranks before it are left out."""
    assert case.setup is not None
    each = max(1, case.setup.devices // case.setup.pipeline)
    return (rank + number_of(case.flags, "rank-offset")) // each if case.setup.pipeline > 1 else 0
