"""Traces of tiny trainings: without data, of ranks of jobs that do not exist; and of this process with real tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
from typing import Any
from unittest import mock

import torch.distributed as dist

from qwen3_npu import cli
from qwen3_npu.args.foreign import FOREIGN_TRAINING
from qwen3_npu.args.pretrain import GROUPS, PretrainArgs
from qwen3_npu.distributed.launch import World
from qwen3_npu.errors import UsageError
from qwen3_npu.parity.rows import ParityRow, rows
from qwen3_npu.plan.__main__ import main as plan_main
from qwen3_npu.plan.activations import TORCH
from qwen3_npu.plan.device import DEVICE_SPECS
from qwen3_npu.plan.from_args import setup_of
from qwen3_npu.plan.hiding.costs import collective_seconds
from qwen3_npu.plan.memory import stage_memory, start_bytes
from qwen3_npu.plan.shape import shape_of
from qwen3_npu.plan.timing import step_time
from qwen3_npu.platform import select_platform
from qwen3_npu.platform.base import Platform
from qwen3_npu.trace.growth import growth
from qwen3_npu.trace.hidden import WAYS, played_ways
from qwen3_npu.trace.rank import RankTrace, recorder_for, trace_rank, traced
from qwen3_npu.training.prepare.plan import TrainingPlan, plan_training

SIZES = "--num-layers 2 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4 --num-query-groups 2 "
SIZES += "--kv-channels 64 --group-query-attention --untie-embeddings-and-output-weights --vocab-size 512 "
TRAIN = "--seq-length 64 --micro-batch-size 2 --train-iters 1 --lr 1e-4 --data-path x "
# Every token goes to every expert: then real routing is even, as a trace takes it to be.
EXPERTS = "--num-experts 4 --moe-router-topk 4 --moe-ffn-hidden-size 32 "
FULL = "--recompute-granularity full --recompute-method block --recompute-num-layers 1"

BF16 = "--bf16 "
EVERY = bool(os.environ.get("EVERY"))

# What one process can run with real tensors.
REAL = {
    "dense": BF16,
    "experts": BF16 + EXPERTS,
    "adapter": BF16 + "--lora-r 4 --lora-target-modules linear_qkv linear_fc2",
    "packed": BF16 + "--stage sft --reset-attention-mask",
    "a layer recomputed": BF16 + FULL,
    "dpo": BF16 + "--stage dpo",
    "kto with an adapter": BF16 + "--stage kto --lora-r 4",
    "rm": BF16 + "--stage rm",
}
if EVERY:
    REAL |= {f"{stage}, packed": f"{BF16}--stage {stage} --reset-attention-mask" for stage in ("dpo", "orpo", "simpo")}
    REAL["dpo from a file"] = BF16 + "--stage dpo --ref-logprobs cache"
# Rows of the parity matrix, with sizes at which what no formula describes (counters, biases of a router) is small.
BIG = "--num-layers 4 --hidden-size 512 --ffn-hidden-size 1536 --num-attention-heads 8 --num-query-groups 4 "
BIG += "--kv-channels 64 --group-query-attention --vocab-size 8192 --seq-length 512 --micro-batch-size 1 "
BIG += "--train-iters 1 --lr 1e-4 --data-path x --global-batch-size 64 "
BIG_EXPERTS = "--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 384 "
SAMPLE = ("untied: TP2 PP2 VPP2 SP", "moe: TP2 SP EP2 ETP1 distributed optimizer", "untied packed: CP2 ring PP2")
# What waits on the host is not the device's.
SWAPPED = "--use-distributed-optimizer --swap-optimizer --swap-optimizer-times 64 --swap-attention"
# Layers as those of a model of 14B on 8 devices.
WIDE = "--num-layers 2 --hidden-size 5120 --ffn-hidden-size 17408 --num-attention-heads 40 --num-query-groups 8 "
WIDE += "--kv-channels 128 --group-query-attention --vocab-size 512 --untie-embeddings-and-output-weights --bf16 "
WIDE += "--seq-length 4096 --micro-batch-size 4 --global-batch-size 4 --train-iters 1 --lr 1e-4 --data-path x "
WIDE += "--tensor-model-parallel-size 8 --sequence-parallel --use-distributed-optimizer"
# Layers as those of 30B-A3B on 2 groups of 8 devices.
MANY = "--num-layers 2 --hidden-size 2048 --ffn-hidden-size 768 --num-attention-heads 32 --num-query-groups 4 "
MANY += "--kv-channels 128 --group-query-attention --vocab-size 512 --untie-embeddings-and-output-weights --bf16 "
MANY += "--num-experts 128 --moe-router-topk 8 --moe-ffn-hidden-size 768 --expert-model-parallel-size 8 "
MANY += "--seq-length 4096 --micro-batch-size 1 --global-batch-size 64 --train-iters 1 --lr 1e-4 --data-path x"
# The closed forms are those of torch's kernels; the reference kernels keep more.
ALL = [row for row in rows() if "reference" not in row.flags]
PRETENDED = {row.name: row for row in ALL if EVERY or row.name in SAMPLE}


# With constants held, so that a new fit of the table moves nothing that is compared.
DEVICE = dataclasses.replace(
    DEVICE_SPECS["910B-64G"],
    product=0.582,
    product_half=3.85e9,
    attention=0.493,
    streaming=0.203,
    transfer=0.577,
    launch=30e-6,
    stall=9e-3,
)


def flags_of(row: ParityRow) -> str:
    """Flags of a training of this row."""
    words = (
        BIG
        + BF16
        + BIG_EXPERTS * (row.model == "moe")
        + "--untie-embeddings-and-output-weights " * (row.model != "tied")
    )
    words += "--stage sft --reset-attention-mask " * row.packed + " ".join(row.flags)
    words = words.replace("--loss-chunk-size 7", "--loss-chunk-size 112")  # the same part of a sample
    return words.replace("--num-layers 4", "--num-layers 6") if "--noop-layers" in row.flags else words


def said(trace: RankTrace) -> dict[str, object]:
    facts = ("stage", "weights", "gradients", "optimizer", "start_peak", "peak")
    return {name: getattr(trace, name) for name in facts} | {"operations": len(trace.operations)}


def parsed(flags: str, size: int) -> tuple[PretrainArgs, TrainingPlan]:
    words = (f"{SIZES}{TRAIN}--global-batch-size 2 {flags}" if "--num-layers" not in flags else flags).split()
    args = PretrainArgs(*cli.parse("pretrain_gpt.py", "", GROUPS, FOREIGN_TRAINING, argv=words).groups)
    return args, plan_training(args, size)


def with_real_tensors(platform: Platform, flags: str) -> RankTrace:
    args, plan = parsed(flags, 1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return traced(recorder_for(args, plan), platform, World(0, 1, 0, platform.bind(0)), args, plan=plan)
    finally:
        dist.destroy_process_group()


# The layout that flags say; the one that a search finds.
COMMANDS = (
    f"--devices 4 --ranks 3 {SIZES}{TRAIN}--bf16 --pipeline-model-parallel-size 2 --micro-batch-size 1".split(),
    ["--model", "qwen3-0.6b", "--devices", "4", "--seq-length", "256", "--global-batch-size", "4", "--ranks", "0"],
)


def by_command(words: list[str]) -> Any:
    """What `python -m qwen3_npu.plan --trace --json` prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), mock.patch.object(sys, "argv", ["plan", "--trace", "--json", *words]):
        plan_main()
    return json.loads(said.getvalue())


def hidden(
    platform: Platform, flags: str, devices: int, groups: tuple[str, str], *, ends: float = 0.0
) -> dict[str, list[float]]:
    """Way to hide communication -> seconds that are left in the layers, of the played step and planned.

    Args:
        groups: what is hidden, as the played step and as the plan call it.
        ends: seconds outside of the layers, which have hardly a product to hide behind.
    """
    args, plan = parsed(flags, devices)
    device, found = DEVICE, {}
    for name, step in played_ways(platform, args, device, devices=devices, rank=0):
        shape, way = shape_of(plan.arch, plan.layout.padded_vocab_size), WAYS[name](args)
        planned = step_time(shape, setup_of(way, plan), device, imbalance=1.0)
        found[name] = [step.exposed[groups[0]] - ends, getattr(planned, groups[1])]
    return found


def main() -> None:
    platform = select_platform("cpu")
    platform.activate()
    # First: what a trace leaves behind (random states without data) is nothing to train with.
    real = {name: said(with_real_tensors(platform, flags)) for name, flags in REAL.items()}
    found: dict[str, object] = {}
    cases = {name: (0, 1, flags) for name, flags in REAL.items()}
    cases |= {name: (row.size - 1, row.size, flags_of(row)) for name, row in PRETENDED.items()}
    cases["swapped"] = 0, 1, f"{BIG}{BF16}--untie-embeddings-and-output-weights {SWAPPED}"
    for name, (rank, size, flags) in cases.items():
        args, plan = parsed(flags, size)
        trace = trace_rank(platform, args, plan, rank)
        shape = shape_of(plan.arch, plan.layout.padded_vocab_size)
        memory = stage_memory(shape, setup_of(args, plan), trace.stage, kernels=TORCH)
        planned = {kind: getattr(memory, kind) for kind in ("weights", "gradients", "optimizer")}
        # Masters and moments are there from the start, too.
        start = max(start_bytes(shape, setup_of(args, plan), trace.stage), memory.static)
        planned |= {"peak": memory.total - memory.start, "start_peak": start}
        found[name] = {"traced": said(trace), "real": real.get(name), "planned": planned}
    flags = BIG + BF16 + "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer"
    args, _ = parsed(flags, 4)
    work = growth(platform, args, DEVICE_SPECS["910B-64G"], devices=4, sizes=(4, 64))
    found["growth"] = [dataclasses.asdict(row) for row in work]
    # The embedding scatters, and gathers in backward; the output layer gathers twice and scatters once.
    ends = 5 * collective_seconds(DEVICE, 8, 1, 4096 * 4 * 5120 * 2)
    found["hidden"] = hidden(platform, WIDE, 8, ("tp", "tensor"), ends=ends)
    found["hidden experts"] = hidden(platform, MANY, 16, ("ep", "expert"))
    found["commands"] = [by_command(words) for words in COMMANDS]
    args, plan = parsed(BF16 + EXPERTS + "--moe-expert-capacity-factor 1.5", 1)
    try:
        trace_rank(platform, args, plan, 0)
    except UsageError as error:
        found["refused"] = str(error)
    json.dump(found, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # gloo's threads of ended groups need not be waited for


if __name__ == "__main__":
    main()
