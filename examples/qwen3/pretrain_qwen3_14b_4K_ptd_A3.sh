#!/usr/bin/env bash
# Pretrain Qwen3-14B at 4096 tokens, on one node of 16 devices (Atlas A3: 16 dies).
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/recipes.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

defaults MODEL=qwen3_14b HF_DIR=./model_from_hf/qwen3_hf \
    NNODES=1 NPUS_PER_NODE=16 TP=8 PP=1 MBS=4 GBS=128 SEQ_LENGTH=4096 TP_OVERLAP=coc

pretrain "$@"
