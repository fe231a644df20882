#!/usr/bin/env bash
# Preference training (DPO) of all weights of Qwen3-30B-A3B at 16384 tokens, on 2 nodes of 16 devices (Atlas A3: 16 dies).
source "$(dirname "${BASH_SOURCE[0]}")/../recipes.sh"

defaults MODEL=qwen3_30b_a3b NNODES=2 NPUS_PER_NODE=16 TP=2 PP=8 MBS=1 GBS=64 SEQ_LENGTH=16384 \
    RECOMPUTE="block 4" LR=5e-8 MIN_LR=0

dpo_full "$@"
