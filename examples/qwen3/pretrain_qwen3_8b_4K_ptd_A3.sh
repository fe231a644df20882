#!/usr/bin/env bash
# Pretrain Qwen3-8B at 4096 tokens, on one node of 16 devices (Atlas A3: 16 dies).
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/recipes.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

defaults MODEL=qwen3_8b NNODES=1 NPUS_PER_NODE=16 TP=2 PP=1 MBS=1 GBS=128 SEQ_LENGTH=4096 REUSE_FP32_PARAM=1 \
    TP_OVERLAP=coc

pretrain "$@"
