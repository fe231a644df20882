#!/usr/bin/env bash
# Alpaca records -> packs of SEQ_LENGTH tokens, for the scripts with "pack" in their name.
export TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/qwen3_30b_a3b_hf}"
export SEQ_LENGTH="${SEQ_LENGTH:-32768}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/../qwen3/data_convert_qwen3_instruction.sh" --pack --neat-pack "$@"
