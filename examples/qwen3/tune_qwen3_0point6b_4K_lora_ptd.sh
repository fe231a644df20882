#!/usr/bin/env bash
# LoRA fine-tuning of Qwen3-0.6B at 8192 tokens, on one node of 8 devices.
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/recipes.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

defaults MODEL=qwen3_0point6b NNODES=1 NPUS_PER_NODE=8 TP=1 PP=1 MBS=1 GBS=16 SEQ_LENGTH=8192

tune_lora "$@"
