#!/usr/bin/env bash
# MMLU of Qwen3-14B with a LoRA adapter, which is merged into the weights while they are loaded.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

HF_DIR="${HF_DIR:-./model_from_hf/qwen3_hf}"
CKPT_LOAD_DIR="${CKPT_LOAD_DIR:-./model_weights/qwen3_mcore}"  # the model
CKPT_LORA="${CKPT_LORA:-./ckpt/qwen3_14b_lora}"                # the adapter: a checkpoint of a LoRA training, or PEFT
DATA_PATH="${DATA_PATH:-./mmlu/data}"

launch evaluation.py \
    --hf-dir "$HF_DIR" --load "$CKPT_LOAD_DIR" --lora-load "$CKPT_LORA" --tokenizer-name-or-path "$HF_DIR" --bf16 \
    --tensor-model-parallel-size "${TP:-2}" --pipeline-model-parallel-size "${PP:-1}" \
    --task mmlu --task-data-path "$DATA_PATH" --output-dir "${OUTPUT_DIR:-.}" --seed 42 \
    "$@"
