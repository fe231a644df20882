#!/usr/bin/env bash
# MMLU of Qwen3-14B with the LoRA adapter in CKPT_LORA (a LoRA training's checkpoint, or PEFT), merged while it is loaded.
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/recipes.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

defaults MODEL=qwen3_14b HF_DIR=./model_from_hf/qwen3_hf NNODES=1 NPUS_PER_NODE=8 TP=2

evaluate --lora-load "${CKPT_LORA:-./ckpt/${MODEL}_lora}" "$@"
