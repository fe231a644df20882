#!/usr/bin/env bash
# Talk with Qwen3-14B on 4 devices. /clear forgets the conversation, /exit ends it.
source "$(dirname "${BASH_SOURCE[0]}")/../recipes.sh"

defaults MODEL=qwen3_14b HF_DIR=./model_from_hf/qwen3_hf NNODES=1 NPUS_PER_NODE=4 TP=4

chat "$@"
