#!/usr/bin/env bash
# Generate text with Qwen3-14B on 4 devices: PREDICT_DATA is a prompt or a file of prompts.
source "$(dirname "${BASH_SOURCE[0]}")/../recipes.sh"

defaults MODEL=qwen3_14b NNODES=1 NPUS_PER_NODE=4 TP=4

generate "$@"
