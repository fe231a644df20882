#!/usr/bin/env bash
# Pretrain Qwen3-235B-A22B at 4096 tokens, on 16 nodes of 16 devices (Atlas A3: 16 dies).
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/recipes.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

defaults MODEL=qwen3_235b_a22b NNODES=16 NPUS_PER_NODE=16 TP=1 PP=4 VPP=8 NOOP_LAYERS=94,95 EP=32 MBS=1 \
    GBS=1024 SEQ_LENGTH=4096 REUSE_FP32_PARAM=1 RECOMPUTE="block 8" \
    CPU_AFFINITY_CONF=1 MOE_OVERLAP=alltoall

pretrain "$@"
