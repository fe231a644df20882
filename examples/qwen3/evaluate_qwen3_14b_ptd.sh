#!/usr/bin/env bash
# MMLU, 5-shot, of Qwen3-14B on one node of 8 devices: four copies of the model at TP2 share the questions.
# Other tasks: TASK="cmmlu" DATA_PATH=./cmmlu bash evaluate_qwen3_14b_ptd.sh. Further flags are passed on.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

HF_DIR="${HF_DIR:-./model_from_hf/qwen3_hf}"
CKPT_LOAD_DIR="${CKPT_LOAD_DIR:-./model_weights/qwen3_mcore}"
DATA_PATH="${DATA_PATH:-./mmlu/data}"

launch evaluation.py \
    --hf-dir "$HF_DIR" --load "$CKPT_LOAD_DIR" --tokenizer-name-or-path "$HF_DIR" --bf16 \
    --tensor-model-parallel-size "${TP:-2}" --pipeline-model-parallel-size "${PP:-1}" \
    --task ${TASK:-mmlu} --task-data-path $DATA_PATH --output-dir "${OUTPUT_DIR:-.}" --seed 42 \
    "$@"
