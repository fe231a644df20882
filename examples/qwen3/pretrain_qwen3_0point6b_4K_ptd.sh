#!/usr/bin/env bash
# Pretrain Qwen3-0.6B at 4096 tokens, on one node of 8 devices.
source "$(dirname "${BASH_SOURCE[0]}")/../recipes.sh"

defaults MODEL=qwen3_0point6b NNODES=1 NPUS_PER_NODE=8 TP=1 PP=1 MBS=1 GBS=32 SEQ_LENGTH=4096 \
    CPU_AFFINITY_CONF=2

pretrain "$@"
