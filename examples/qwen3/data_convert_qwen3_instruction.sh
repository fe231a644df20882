#!/usr/bin/env bash
# Alpaca records -> files for fine-tuning: <OUTPUT_PREFIX>_packed_{input_ids,attention_mask,labels}_document.bin and .idx
# To see what is learned before anything is written: --check or --show 3
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/common.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

INPUT="${INPUT:-./dataset}"
OUTPUT_PREFIX="${OUTPUT_PREFIX:-./finetune_dataset/alpaca}"
TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/qwen3_hf}"

run preprocess_data.py \
    --input "$INPUT" \
    --output-prefix "$OUTPUT_PREFIX" \
    --handler-name AlpacaStyleInstructionHandler \
    --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --prompt-type "${PROMPT_TYPE:-auto}" --enable-thinking "${ENABLE_THINKING:-none}" \
    --seq-length "${SEQ_LENGTH:-4096}" \
    --workers "${WORKERS:-4}" \
    "$@"
