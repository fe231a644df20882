#!/usr/bin/env bash
# Generate text with Qwen3-14B on 4 devices: PREDICT_DATA is a prompt or a file of prompts.
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/recipes.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

defaults MODEL=qwen3_14b HF_DIR=./model_from_hf/qwen3_hf NNODES=1 NPUS_PER_NODE=4 TP=4

generate "$@"
