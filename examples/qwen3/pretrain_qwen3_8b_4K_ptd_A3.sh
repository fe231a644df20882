#!/usr/bin/env bash
# Pretrain Qwen3-8B at 4096 tokens, on one node of 16 devices (Atlas A3: 16 dies).
source "$(dirname "${BASH_SOURCE[0]}")/../recipes.sh"

defaults MODEL=qwen3_8b NNODES=1 NPUS_PER_NODE=16 TP=2 PP=1 MBS=1 GBS=128 SEQ_LENGTH=4096

pretrain "$@"
