#!/usr/bin/env bash
# Qwen3-30B-A3B: Megatron checkpoint (converted or trained, any layout) -> Hugging Face directory.
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/common.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

MCORE_DIR="${MCORE_DIR:-./model_weights/qwen3_30b_a3b_mcore}"
HF_OUT_DIR="${HF_OUT_DIR:-./hf_weights/qwen3_30b_a3b_hf}"

run convert_ckpt.py \
    --load-model-type mg --load-dir "$MCORE_DIR" \
    --save-model-type hf --save-dir "$HF_OUT_DIR" \
    "$@"
