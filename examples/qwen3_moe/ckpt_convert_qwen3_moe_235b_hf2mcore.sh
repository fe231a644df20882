#!/usr/bin/env bash
# Qwen3-235B-A22B: Hugging Face weights -> Megatron shards of 96 places, two of them without weights.
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/common.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

HF_DIR="${HF_DIR:-./model_from_hf/qwen3_235b_a22b_hf}"
MCORE_DIR="${MCORE_DIR:-./model_weights/qwen3_235b_a22b_mcore}"

run convert_ckpt.py \
    --load-model-type hf --load-dir "$HF_DIR" \
    --save-model-type mg --save-dir "$MCORE_DIR" \
    --target-tensor-parallel-size "${TP:-1}" \
    --target-pipeline-parallel-size "${PP:-4}" \
    --target-expert-parallel-size "${EP:-32}" \
    --num-layers-per-virtual-pipeline-stage "${VPP:-8}" \
    --noop-layers "${NOOP_LAYERS:-94,95}" \
    "$@"
