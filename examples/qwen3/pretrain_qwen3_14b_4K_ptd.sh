#!/usr/bin/env bash
# Pretrain Qwen3-14B at 4096 tokens, on one node of 8 devices.
source "$(dirname "${BASH_SOURCE[0]}")/../recipes.sh"

defaults MODEL=qwen3_14b HF_DIR=./model_from_hf/qwen3_hf CKPT_LOAD_DIR=./model_weights/qwen3_mcore \
    NNODES=1 NPUS_PER_NODE=8 TP=8 PP=1 MBS=4 GBS=128 SEQ_LENGTH=4096
pretrain "$@"
