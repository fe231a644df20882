#!/usr/bin/env bash
# LoRA fine-tuning of Qwen3-235B-A22B at 32768 tokens, samples packed, on 8 nodes of 8 devices.
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/recipes.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

defaults MODEL=qwen3_235b_a22b NNODES=8 NPUS_PER_NODE=8 TP=4 PP=8 VPP=4 NOOP_LAYERS=94,95 EP=2 ETP=4 MBS=1 \
    GBS=32 SEQ_LENGTH=32768 REUSE_FP32_PARAM=1 RECOMPUTE="block 4" PACKED=1 LR=1.5e-5 MIN_LR=1e-7 \
    CPU_AFFINITY_CONF=1 MANUAL_GC=10

tune_lora "$@"
