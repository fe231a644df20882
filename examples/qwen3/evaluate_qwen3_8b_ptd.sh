#!/usr/bin/env bash
# MMLU, 5-shot, of Qwen3-8B on one node of 8 devices; other tasks: TASK and DATA_PATH.
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/recipes.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

defaults MODEL=qwen3_8b NNODES=1 NPUS_PER_NODE=8 TP=1 PP=1

evaluate "$@"
