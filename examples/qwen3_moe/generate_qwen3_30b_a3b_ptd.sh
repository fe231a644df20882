#!/usr/bin/env bash
# Generate text with Qwen3-30B-A3B on one node of 8 devices: PREDICT_DATA is a prompt or a file of prompts.
source "$(dirname "${BASH_SOURCE[0]}")/../recipes.sh"

defaults MODEL=qwen3_30b_a3b NNODES=1 NPUS_PER_NODE=8 TP=1 PP=8 EP=1

generate "$@"
