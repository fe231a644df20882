#!/usr/bin/env bash
# Fine-tune all weights of Qwen3-30B-A3B at 32768 tokens, samples packed, on 2 nodes of 16 devices (Atlas A3: 16 dies).
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/recipes.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

defaults MODEL=qwen3_30b_a3b NNODES=2 NPUS_PER_NODE=16 TP=4 PP=2 EP=8 ETP=1 MBS=1 GBS=32 SEQ_LENGTH=32768 \
    RECOMPUTE="uniform 1" SWAP_OPTIMIZER=16 SWAP_ATTENTION=1 PACKED=1 LR=1.25e-5 MIN_LR=1.25e-7 \
    CPU_AFFINITY_CONF=1 MANUAL_GC=50 MOE_OVERLAP=alltoall

tune_full "$@"
