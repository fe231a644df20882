#!/usr/bin/env bash
# Generate text with Qwen3-14B on 4 devices: bash generate_qwen3_14b_ptd.sh --prompt "how are you?" --stream
# Results: text_generation_result.jsonl and .txt in OUTPUT_DIR. Further flags are passed on.
NPUS_PER_NODE="${NPUS_PER_NODE:-4}"
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

HF_DIR="${HF_DIR:-./model_from_hf/qwen3_hf}"                   # config.json and tokenizer
CKPT_LOAD_DIR="${CKPT_LOAD_DIR:-./model_weights/qwen3_mcore}"  # a checkpoint of any layout, or $HF_DIR itself
PREDICT_DATA="${PREDICT_DATA:-how are you?}"                   # a prompt, or a file of prompts

launch inference.py \
    --hf-dir "$HF_DIR" --load "$CKPT_LOAD_DIR" --tokenizer-name-or-path "$HF_DIR" --bf16 \
    --tensor-model-parallel-size "${TP:-4}" --pipeline-model-parallel-size "${PP:-1}" \
    --task ${TASK:-greedy} --predict-data "$PREDICT_DATA" --max-new-tokens "${MAX_NEW_TOKENS:-256}" \
    --hf-chat-template --output-dir "${OUTPUT_DIR:-.}" --seed 42 \
    "$@"
