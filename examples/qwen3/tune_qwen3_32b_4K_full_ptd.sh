#!/usr/bin/env bash
# Fine-tune all weights of Qwen3-32B at 4096 tokens, on 2 nodes of 8 devices.
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/recipes.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

defaults MODEL=qwen3_32b NNODES=2 NPUS_PER_NODE=8 TP=8 PP=2 MBS=1 GBS=16 SEQ_LENGTH=4096

tune_full "$@"
