#!/usr/bin/env bash
# Pretrain Qwen3-32B at 4096 tokens, on one node of 16 devices (Atlas A3: 16 dies).
source "$(dirname "${BASH_SOURCE[0]}")/../recipes.sh"

defaults MODEL=qwen3_32b NNODES=1 NPUS_PER_NODE=16 TP=8 PP=2 VPP=4 MBS=2 GBS=256 SEQ_LENGTH=4096

pretrain "$@"
