#!/usr/bin/env bash
# Fine-tune all weights of Qwen3-1.7B at 4096 tokens, on one node of 8 devices.
source "$(dirname "${BASH_SOURCE[0]}")/../recipes.sh"

defaults MODEL=qwen3_1point7b NNODES=1 NPUS_PER_NODE=8 TP=1 PP=1 MBS=1 GBS=32 SEQ_LENGTH=4096

tune_full "$@"
