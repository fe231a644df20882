#!/usr/bin/env bash
# Alpaca records -> packs of SEQ_LENGTH tokens, for the scripts with "pack" in their name.
export TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/qwen3_30b_a3b_hf}"
export SEQ_LENGTH="${SEQ_LENGTH:-32768}"
script="${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/qwen3/data_convert_qwen3_instruction.sh"
[ -f "$script" ] ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }
exec bash "$script" --pack --neat-pack "$@"
