#!/usr/bin/env bash
# Talk with Qwen3-14B on 4 devices. /clear forgets the conversation, /exit ends it. Further flags are passed on.
NPUS_PER_NODE="${NPUS_PER_NODE:-4}"
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

HF_DIR="${HF_DIR:-./model_from_hf/qwen3_hf}"
CKPT_LOAD_DIR="${CKPT_LOAD_DIR:-./model_weights/qwen3_mcore}"

launch inference.py \
    --hf-dir "$HF_DIR" --load "$CKPT_LOAD_DIR" --tokenizer-name-or-path "$HF_DIR" --bf16 \
    --tensor-model-parallel-size "${TP:-4}" --pipeline-model-parallel-size "${PP:-1}" \
    --task chat --hf-chat-template --enable-thinking "${ENABLE_THINKING:-true}" \
    --max-new-tokens "${MAX_NEW_TOKENS:-2048}" --history-turns 10 --temperature 0.6 --top-k 20 --top-p 0.95 --seed 42 \
    "$@"
