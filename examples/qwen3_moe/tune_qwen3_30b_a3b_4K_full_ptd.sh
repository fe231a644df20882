#!/usr/bin/env bash
# Fine-tune all weights of Qwen3-30B-A3B at 4096 tokens, on 2 nodes of 8 devices.
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/recipes.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

defaults MODEL=qwen3_30b_a3b NNODES=2 NPUS_PER_NODE=8 TP=4 PP=2 EP=2 MBS=4 GBS=64 SEQ_LENGTH=4096 LR=1.25e-5 \
    MIN_LR=1.25e-7

tune_full "$@"
