#!/usr/bin/env bash
# Fine-tune all weights of Qwen3-235B-A22B at 131072 tokens, samples packed, on 16 nodes of 16 devices (Atlas A3: 16 dies).
# Beyond a model's own positions (40960; of the 2507 models 262144) plain RoPE is stretched, and the start says so.
# YARN_FACTOR=8 trains with YaRN instead (of YARN_ORIGINAL=32768 positions); checkpoints and exports carry it.
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/recipes.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

defaults MODEL=qwen3_235b_a22b NNODES=16 NPUS_PER_NODE=16 TP=4 PP=8 VPP=4 NOOP_LAYERS=94,95 CP=8 EP=32 ETP=1 \
    MBS=1 GBS=32 SEQ_LENGTH=131072 RECOMPUTE="uniform 1" PACKED=1 LR=12e-6 MIN_LR=12e-7 \
    CPU_AFFINITY_CONF=1 STREAMS_PER_DEVICE=32 MANUAL_GC=10 TP_OVERLAP=coc MOE_OVERLAP=fb

tune_full "$@"
