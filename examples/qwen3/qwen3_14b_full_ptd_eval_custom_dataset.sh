#!/usr/bin/env bash
# Evaluate a tuned Qwen3-14B on conversations of your own (docs/evaluation.md says what a line looks like):
# accuracy, a confusion table, and every answer in samples_custom.jsonl.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

HF_DIR="${HF_DIR:-./model_from_hf/qwen3_hf}"
CKPT_LOAD_DIR="${CKPT_LOAD_DIR:-./ckpt/qwen3_14b}"
DATA_PATH="${DATA_PATH:-./dataset/eval.jsonl}"

launch evaluation.py \
    --hf-dir "$HF_DIR" --load "$CKPT_LOAD_DIR" --tokenizer-name-or-path "$HF_DIR" --bf16 \
    --tensor-model-parallel-size "${TP:-8}" --pipeline-model-parallel-size "${PP:-1}" \
    --task custom --task-data-path "$DATA_PATH" --match "${MATCH:-exact}" --log-samples \
    --prompt-type "${PROMPT_TYPE:-qwen3}" --max-new-tokens "${MAX_NEW_TOKENS:-256}" \
    --output-dir "${OUTPUT_DIR:-.}" --seed 42 \
    "$@"
