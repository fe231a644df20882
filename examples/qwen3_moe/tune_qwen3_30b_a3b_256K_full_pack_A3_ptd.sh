#!/usr/bin/env bash
# Fine-tune all weights of Qwen3-30B-A3B at 262144 tokens, samples packed, on 8 nodes of 16 devices (Atlas A3: 16 dies).
# Beyond a model's own positions (40960; of the 2507 models 262144) plain RoPE is stretched, and the start says so.
# YARN_FACTOR=8 trains with YaRN instead (of YARN_ORIGINAL=32768 positions); checkpoints and exports carry it.
source "${EXAMPLES:-$(dirname "${BASH_SOURCE[0]}")/..}/recipes.sh" ||
    { echo "$0: if this script was copied, set EXAMPLES to the examples folder of qwen3_npu" >&2; exit 2; }

defaults MODEL=qwen3_30b_a3b NNODES=8 NPUS_PER_NODE=16 TP=2 PP=2 CP=16 EP=16 ETP=1 MBS=1 GBS=32 \
    SEQ_LENGTH=262144 MOE_ZERO_MEMORY=level1 PACKED=1 LR=1.25e-5 MIN_LR=1.25e-7 \
    CPU_AFFINITY_CONF=1 HCCL_CONNECT_TIMEOUT=6000 HCCL_EXEC_TIMEOUT=5400 MANUAL_GC=50 MOE_OVERLAP=alltoall

tune_full "$@"
