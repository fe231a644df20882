#!/usr/bin/env bash
# Preference training (DPO) of all weights of Qwen3-30B-A3B at 16384 tokens, on 2 nodes of 16 devices (Atlas A3: 16 dies).
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/recipes.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

defaults MODEL=qwen3_30b_a3b NNODES=2 NPUS_PER_NODE=16 TP=2 PP=8 MBS=1 GBS=64 SEQ_LENGTH=16384 \
    RECOMPUTE="block 4" LR=5e-8 MIN_LR=0

dpo_full "$@"
