#!/usr/bin/env bash
# LoRA fine-tuning of Qwen3-14B at 4096 tokens, on one node of 8 devices.
source "$(dirname "${BASH_SOURCE[0]}")/../recipes.sh"

defaults MODEL=qwen3_14b HF_DIR=./model_from_hf/qwen3_hf \
    NNODES=1 NPUS_PER_NODE=8 TP=2 PP=2 MBS=4 GBS=64 SEQ_LENGTH=4096
tune_lora "$@"
