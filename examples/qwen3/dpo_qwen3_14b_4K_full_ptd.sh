#!/usr/bin/env bash
# Preference training (DPO) of all weights of Qwen3-14B at 4096 tokens, on one node of 8 devices.
source "$(dirname "${BASH_SOURCE[0]}")/../recipes.sh"

defaults MODEL=qwen3_14b NNODES=1 NPUS_PER_NODE=8 TP=8 PP=1 MBS=1 GBS=64 SEQ_LENGTH=4096

dpo_full "$@"
