#!/usr/bin/env bash
# LoRA fine-tuning of Qwen3-8B at 4096 tokens, on one node of 8 devices.
source "$(dirname "${BASH_SOURCE[0]}")/../recipes.sh"

defaults MODEL=qwen3_8b NNODES=1 NPUS_PER_NODE=8 TP=1 PP=2 MBS=4 GBS=16 SEQ_LENGTH=4096

tune_lora "$@"
