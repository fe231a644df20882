#!/usr/bin/env bash
# A model and the LoRA adapter that was trained for it -> a Hugging Face directory with the adapter merged in.
# The adapter alone, for PEFT: LORA_DIR as --load-dir and --save-lora-to-hf, without --lora-load.
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/common.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

MCORE_DIR="${MCORE_DIR:-./model_weights/qwen3_mcore}"          # the model; for a Hugging Face directory give LOAD_TYPE=hf
LORA_DIR="${LORA_DIR:-./ckpt/qwen3_14b_lora}"
HF_OUT_DIR="${HF_OUT_DIR:-./hf_weights/qwen3_hf_merged}"

run convert_ckpt.py \
    --load-model-type "${LOAD_TYPE:-mg}" --load-dir "$MCORE_DIR" --lora-load "$LORA_DIR" \
    --save-model-type hf --save-dir "$HF_OUT_DIR" \
    "$@"
