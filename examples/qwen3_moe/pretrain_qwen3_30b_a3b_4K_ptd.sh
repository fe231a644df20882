#!/usr/bin/env bash
# Pretrain Qwen3-30B-A3B at 4096 tokens, on 2 nodes of 8 devices.
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/recipes.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

defaults MODEL=qwen3_30b_a3b NNODES=2 NPUS_PER_NODE=8 TP=1 PP=2 EP=8 MBS=1 GBS=256 SEQ_LENGTH=4096 \
    RECOMPUTE="uniform 1" \
    MANUAL_GC=15

pretrain "$@"
