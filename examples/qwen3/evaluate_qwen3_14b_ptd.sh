#!/usr/bin/env bash
# MMLU, 5-shot, of Qwen3-14B on one node of 8 devices: four copies of the model at TP2 share the questions.
source "$(dirname "${BASH_SOURCE[0]}")/../recipes.sh"

defaults MODEL=qwen3_14b HF_DIR=./model_from_hf/qwen3_hf NNODES=1 NPUS_PER_NODE=8 TP=2

evaluate "$@"
