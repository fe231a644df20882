#!/usr/bin/env bash
# Evaluate a tuned Qwen3-14B on conversations of your own (docs/evaluation.md says what a line looks like):
# accuracy, a confusion table, and every answer in samples_custom.jsonl.
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/recipes.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

defaults MODEL=qwen3_14b HF_DIR=./model_from_hf/qwen3_hf CKPT_LOAD_DIR=./ckpt/qwen3_14b_full \
    NNODES=1 NPUS_PER_NODE=8 TP=8 TASK=custom DATA_PATH=./dataset/eval.jsonl

evaluate --match "${MATCH:-exact}" --log-samples --prompt-type "${PROMPT_TYPE:-auto}" \
    --max-new-tokens "${MAX_NEW_TOKENS:-256}" "$@"
