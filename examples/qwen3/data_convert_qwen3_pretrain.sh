#!/usr/bin/env bash
# Text -> token files for pretraining: <OUTPUT_PREFIX>_text_document.bin and .idx
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/common.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

INPUT="${INPUT:-./dataset}"
OUTPUT_PREFIX="${OUTPUT_PREFIX:-./dataset/enwiki}"
TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/qwen3_hf}"

run preprocess_data.py \
    --input "$INPUT" \
    --output-prefix "$OUTPUT_PREFIX" \
    --handler-name GeneralPretrainHandler \
    --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --json-keys text \
    --append-eod \
    --workers "${WORKERS:-4}" \
    "$@"
