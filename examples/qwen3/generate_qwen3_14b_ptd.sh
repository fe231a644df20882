#!/usr/bin/env bash
# Generate text with Qwen3-14B on 4 devices: PREDICT_DATA is a prompt or a file of prompts.
source "$(dirname "${BASH_SOURCE[0]}")/../recipes.sh"

defaults MODEL=qwen3_14b HF_DIR=./model_from_hf/qwen3_hf NNODES=1 NPUS_PER_NODE=4 TP=4

generate "$@"
