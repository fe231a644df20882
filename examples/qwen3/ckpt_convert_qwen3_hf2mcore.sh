#!/usr/bin/env bash
# Hugging Face weights -> Megatron shards. Further flags are passed on: bash ckpt_convert_qwen3_hf2mcore.sh --jobs 8
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/common.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

HF_DIR="${HF_DIR:-./model_from_hf/qwen3_hf}"
MCORE_DIR="${MCORE_DIR:-./model_weights/qwen3_mcore}"

run convert_ckpt.py \
    --load-model-type hf --load-dir "$HF_DIR" \
    --save-model-type mg --save-dir "$MCORE_DIR" \
    --target-tensor-parallel-size "${TP:-8}" \
    --target-pipeline-parallel-size "${PP:-1}" \
    "$@"
