#!/usr/bin/env bash
# MMLU, 5-shot, of Qwen3-14B on one node of 8 devices: four copies of the model at TP2 share the questions.
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/recipes.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

defaults MODEL=qwen3_14b HF_DIR=./model_from_hf/qwen3_hf NNODES=1 NPUS_PER_NODE=8 TP=2

evaluate "$@"
