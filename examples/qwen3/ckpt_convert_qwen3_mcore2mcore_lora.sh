#!/usr/bin/env bash
# A model and the LoRA adapter that was trained for it -> one Megatron checkpoint, in any layout.
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/common.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

MCORE_DIR="${MCORE_DIR:-./model_weights/qwen3_mcore}"          # the model; for a Hugging Face directory give LOAD_TYPE=hf
LORA_DIR="${LORA_DIR:-./ckpt/qwen3_14b_lora}"
MERGED_DIR="${MERGED_DIR:-./model_weights/qwen3_mcore_merged}"

run convert_ckpt.py \
    --load-model-type "${LOAD_TYPE:-mg}" --load-dir "$MCORE_DIR" --lora-load "$LORA_DIR" \
    --save-model-type mg --save-dir "$MERGED_DIR" \
    --target-tensor-parallel-size "${TP:-2}" --target-pipeline-parallel-size "${PP:-4}" \
    "$@"
