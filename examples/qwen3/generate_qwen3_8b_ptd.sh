#!/usr/bin/env bash
# Generate text with Qwen3-8B on one node of 8 devices: PREDICT_DATA is a prompt or a file of prompts.
source "$(dirname "${BASH_SOURCE[0]}")/../recipes.sh"

defaults MODEL=qwen3_8b NNODES=1 NPUS_PER_NODE=8 TP=1 PP=2

generate "$@"
