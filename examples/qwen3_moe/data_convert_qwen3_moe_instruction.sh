#!/usr/bin/env bash
# Data for Qwen3-MoE is made as for Qwen3.
export TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/qwen3_30b_a3b_hf}"
script="${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/qwen3/data_convert_qwen3_instruction.sh"
[ -f "$script" ] ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }
exec bash "$script" "$@"
