"""Traces of tiny trainings: without data, of ranks of jobs that do not exist; and of this process with real tensors."""

from __future__ import annotations

import json
import os
import sys

import torch.distributed as dist

from qwen3_npu import cli
from qwen3_npu.args.foreign import FOREIGN_TRAINING
from qwen3_npu.args.pretrain import GROUPS, PretrainArgs
from qwen3_npu.distributed.launch import World
from qwen3_npu.plan.activations import TORCH
from qwen3_npu.plan.from_args import setup_of
from qwen3_npu.plan.memory import stage_memory
from qwen3_npu.plan.shape import shape_of
from qwen3_npu.platform import select_platform
from qwen3_npu.platform.base import Platform
from qwen3_npu.trace.rank import RankTrace, recorder_for, trace_rank, traced
from qwen3_npu.training.prepare.plan import TrainingPlan, plan_training

SIZES = "--num-layers 2 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4 --num-query-groups 2 "
SIZES += "--kv-channels 64 --group-query-attention --untie-embeddings-and-output-weights --vocab-size 512 "
TRAIN = "--seq-length 64 --micro-batch-size 2 --train-iters 1 --lr 1e-4 --data-path x "
# Every token goes to every expert: then real routing is even, as a trace takes it to be.
EXPERTS = "--num-experts 4 --moe-router-topk 4 --moe-ffn-hidden-size 32 "
FULL = "--recompute-granularity full --recompute-method block --recompute-num-layers 1"

BF16 = "--bf16 "

# What one process can run with real tensors.
REAL = {
    "dense": BF16,
    "experts": BF16 + EXPERTS,
    "adapter": BF16 + "--lora-r 4 --lora-target-modules linear_qkv linear_fc2",
    "packed": BF16 + "--stage sft --reset-attention-mask",
    "a layer recomputed": BF16 + FULL,
}
TP2_SP = "--tensor-model-parallel-size 2 --sequence-parallel "
# Jobs of 8, with the rank to trace.
PRETENDED = {
    "TP2 PP2": (5, BF16 + TP2_SP + "--pipeline-model-parallel-size 2 --use-distributed-optimizer"),
    "CP2 ring": (3, BF16 + "--context-parallel-size 2 --context-parallel-algo megatron_cp_algo"),
    "TP2 EP2 ETP1": (7, BF16 + EXPERTS + TP2_SP + "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1"),
}


def said(trace: RankTrace) -> dict[str, object]:
    facts = ("stage", "weights", "gradients", "optimizer", "peak")
    return {name: getattr(trace, name) for name in facts} | {"operations": len(trace.operations)}


def parsed(flags: str, size: int) -> tuple[PretrainArgs, TrainingPlan]:
    words = f"{SIZES}{TRAIN}--global-batch-size {2 if size == 1 else 64} {flags}".split()
    args = PretrainArgs(*cli.parse("pretrain_gpt.py", "", GROUPS, FOREIGN_TRAINING, argv=words).groups)
    return args, plan_training(args, size)


def with_real_tensors(platform: Platform, flags: str) -> RankTrace:
    args, plan = parsed(flags, 1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return traced(recorder_for(args, plan), platform, World(0, 1, 0, platform.bind(0)), args, plan=plan)
    finally:
        dist.destroy_process_group()


def main() -> None:
    platform = select_platform("cpu")
    platform.activate()
    # First: what a trace leaves behind (random states without data) is nothing to train with.
    real = {name: said(with_real_tensors(platform, flags)) for name, flags in REAL.items()}
    found = {}
    for name, (rank, flags) in ({name: (0, flags) for name, flags in REAL.items()} | PRETENDED).items():
        args, plan = parsed(flags, 1 if name in REAL else 8)
        trace = trace_rank(platform, args, plan, rank)
        shape = shape_of(plan.arch, plan.layout.padded_vocab_size)
        memory = stage_memory(shape, setup_of(args, plan), trace.stage, kernels=TORCH)
        planned = {kind: getattr(memory, kind) for kind in ("weights", "gradients", "optimizer")}
        found[name] = {"traced": said(trace), "real": real.get(name), "planned": planned | {"peak": memory.total}}
    json.dump(found, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # gloo's threads of ended groups need not be waited for


if __name__ == "__main__":
    main()
