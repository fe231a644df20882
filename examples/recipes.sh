# Sourced by the scripts of each size. A script says its sizes and calls one of
#   pretrain | tune_full | tune_lora | dpo_full | dpo_lora | rm_full | rm_lora | generate | chat | evaluate FLAGS...
# Every NAME=VALUE given to `defaults` can be set in the environment instead, and every flag given to a script is passed
# on last, so that it wins. Launching, logs and DRY_RUN=1: see common.sh.

defaults() { # NAME=VALUE..., set where the environment does not say otherwise; MODEL is part of folder names
    local pair name
    for pair in "$@"; do
        name="${pair%%=*}"
        if [ -z "${!name+set}" ]; then printf -v "$name" '%s' "${pair#*=}"; fi
    done
    HCCL_EXEC_TIMEOUT="${HCCL_EXEC_TIMEOUT-3600}" # as nearly all originals; empty: CANN's own
    for name in CPU_AFFINITY_CONF STREAMS_PER_DEVICE HCCL_CONNECT_TIMEOUT HCCL_EXEC_TIMEOUT; do # CANN reads these
        if [ -n "${!name:-}" ]; then export "${name?}"; fi
    done
    source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
    HF_DIR="${HF_DIR:-./model_from_hf/${MODEL}_hf}"       # config.json and tokenizer
    CKPT_LOAD_DIR="${CKPT_LOAD_DIR-$HF_DIR}"              # Hugging Face or converted weights, a checkpoint; empty: random
    PARALLEL=(--tensor-model-parallel-size "${TP:-1}" --pipeline-model-parallel-size "${PP:-1}")
    if [ -n "${VPP:-}" ]; then PARALLEL+=(--num-layers-per-virtual-pipeline-stage "$VPP"); fi
    if [ -n "${NOOP_LAYERS:-}" ]; then PARALLEL+=(--noop-layers "$NOOP_LAYERS"); fi
    if [ -n "${EP:-}" ]; then PARALLEL+=(--expert-model-parallel-size "$EP"); fi
    if [ -n "${ETP:-}" ]; then PARALLEL+=(--expert-tensor-parallel-size "$ETP"); fi
}

words_of() { # TEXT: sets words, one path (which may hold spaces), or several and their weights
    local end
    for end in "" .idx _packed{,_chosen,_answer}_input_ids_document.idx; do
        if [ -e "$1$end" ]; then words=("$1"); return; fi
    done
    read -r -a words <<<"$1"
}

train() { # flags of this kind of training...
    if [ "${TP:-1}" -gt 1 ]; then PARALLEL+=(--sequence-parallel); fi
    if [ -n "${CP:-}" ]; then
        PARALLEL+=(--context-parallel-size "$CP" --context-parallel-algo "${CP_ALGO:-ulysses_cp_algo}")
    fi
    case "${TP_OVERLAP:-}" in # products hide tensor parallelism's communication: in pieces, or fused operations on NPUs
        coc) PARALLEL+=(--use-ascend-coc) ;;
        mc2) PARALLEL+=(--use-ascend-mc2) ;;
        "") ;;
        *) echo "$0: TP_OVERLAP=$TP_OVERLAP: coc or mc2" >&2; exit 2 ;;
    esac
    case "${MOE_OVERLAP:-}" in # products hide the exchange of experts: in pieces, or those of another micro-batch
        alltoall) PARALLEL+=(--moe-alltoall-overlap-comm) ;;
        fb) PARALLEL+=(--moe-fb-overlap) ;;
        both) PARALLEL+=(--moe-alltoall-overlap-comm --moe-fb-overlap) ;;
        "") ;;
        *) echo "$0: MOE_OVERLAP=$MOE_OVERLAP: alltoall, fb or both" >&2; exit 2 ;;
    esac
    local memory=()
    if [ -n "${RECOMPUTE:-}" ]; then # METHOD LAYERS
        memory+=(--recompute-granularity full --recompute-method "${RECOMPUTE% *}")
        memory+=(--recompute-num-layers "${RECOMPUTE#* }")
    fi
    if [ -n "${SWAP_OPTIMIZER:-}" ]; then # slices of a step
        memory+=(--swap-optimizer --swap-optimizer-times "$SWAP_OPTIMIZER")
    fi
    if [ -n "${SWAP_ATTENTION:-}" ]; then memory+=(--swap-attention); fi # the MLPs of RECOMPUTE's layers are recomputed
    if [ -n "${REUSE_FP32_PARAM:-}" ]; then memory+=(--reuse-fp32-param); fi
    if [ -n "${MOE_ZERO_MEMORY:-}" ]; then memory+=(--moe-zero-memory "$MOE_ZERO_MEMORY"); fi
    local collect=()
    if [ -n "${MANUAL_GC:-}" ]; then collect=(--manual-gc --manual-gc-interval "$MANUAL_GC"); fi  # steps
    if [ "$SEQ_LENGTH" -gt 40960 ]; then memory+=(--max-position-embeddings "$SEQ_LENGTH"); fi
    if [ -n "${YARN_FACTOR:-}" ]; then # positions times this
        memory+=(--rope-scaling-type yarn --rope-scaling-factor "$YARN_FACTOR")
        memory+=(--rope-scaling-original-max-position-embeddings "${YARN_ORIGINAL:-32768}")
    fi
    local length=(--train-iters "${TRAIN_ITERS:-2000}")
    if [ -n "${EPOCHS:-}" ]; then length=(--epochs "$EPOCHS"); fi
    local start=(--load "$CKPT_LOAD_DIR")
    if [ -z "$CKPT_LOAD_DIR" ]; then start=(--from-scratch); fi
    local words
    words_of "$DATA_PATH"
    launch pretrain_gpt.py \
        --hf-dir "$HF_DIR" "${start[@]}" --save "$CKPT_SAVE_DIR" --data-path "${words[@]}" --split 100,0,0 \
        "${PARALLEL[@]}" "${memory[@]}" "${collect[@]}" \
        --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
        --seq-length "$SEQ_LENGTH" --micro-batch-size "$MBS" --global-batch-size "$GBS" --bf16 \
        "${length[@]}" --save-interval "${SAVE_INTERVAL:-2000}" \
        --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine --lr-warmup-fraction 0.01 \
        --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 \
        --log-interval 1 --eval-iters 0 --tensorboard-dir "$CKPT_SAVE_DIR/tensorboard" --seed 42 \
        "$@"
}

pretrain() {
    CKPT_SAVE_DIR="${CKPT_SAVE_DIR:-./ckpt/$MODEL}"
    DATA_PATH="${DATA_PATH:-./dataset/enwiki_text_document}"
    LR="${LR:-1.25e-6}" MIN_LR="${MIN_LR:-1.25e-7}"
    train --init-method-std 0.01 "$@"
}

tune() { # as train; data with boundaries between samples (PACKED=1), or samples padded to their longest
    DATA_PATH="${DATA_PATH:-./finetune_dataset/alpaca}"   # prefix of prepared data, or a raw file with --handler-name
    local rows=--variable-seq-lengths
    if [ -n "${PACKED:-}" ]; then rows=--reset-attention-mask; fi
    train --stage sft --finetune --is-instruction-dataset --prompt-type "${PROMPT_TYPE:-auto}" "$rows" \
        --tokenizer-name-or-path "$HF_DIR" "$@"
}

tune_full() {
    CKPT_SAVE_DIR="${CKPT_SAVE_DIR:-./ckpt/${MODEL}_full}"
    LR="${LR:-1.25e-6}" MIN_LR="${MIN_LR:-1.25e-7}"
    tune "$@"
}

tune_lora() {
    CKPT_SAVE_DIR="${CKPT_SAVE_DIR:-./ckpt/${MODEL}_lora}" # the adapter; the weights stay where they are
    LR="${LR:-1.25e-5}" MIN_LR="${MIN_LR:-1.25e-7}"
    tune --lora-r "${LORA_R:-16}" --lora-alpha "${LORA_ALPHA:-32}" --lora-ckpt-filter \
        --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2 "$@"
}

prefer() { # as tune, on pairs of answers; STAGE=orpo, simpo or kto (labelled answers, MBS=2 or more) for other losses
    DATA_PATH="${DATA_PATH:-./pref_dataset/pairs}"         # prefix of prepared pairs, or a raw file with --handler-name
    local rows=--variable-seq-lengths stage="${STAGE:-dpo}" strength=(--is-pairwise-dataset --dpo-beta "${BETA:-0.1}")
    if [ -n "${PACKED:-}" ]; then rows=--reset-attention-mask; fi
    case "$stage" in
        rm) strength=(--is-pairwise-dataset) ;;
        kto) strength=(--dpo-beta "${BETA:-0.1}") ;;
        dpo) if [ -n "${REF_LOGPROBS:-}" ]; then strength+=(--ref-logprobs "$REF_LOGPROBS"); fi ;;
    esac
    train --stage "$stage" --finetune --prompt-type "${PROMPT_TYPE:-auto}" "$rows" \
        --tokenizer-name-or-path "$HF_DIR" "${strength[@]}" "$@"
}

prefer_lora() {
    prefer --lora-r "${LORA_R:-16}" --lora-alpha "${LORA_ALPHA:-32}" --lora-ckpt-filter \
        --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2 "$@"
}

dpo_full() {
    CKPT_SAVE_DIR="${CKPT_SAVE_DIR:-./ckpt/${MODEL}_dpo}"
    LR="${LR:-5e-7}" MIN_LR="${MIN_LR:-0}"
    REF_LOGPROBS="${REF_LOGPROBS:-cache}"                   # cache: no second model in memory
    prefer "$@"
}

dpo_lora() {
    CKPT_SAVE_DIR="${CKPT_SAVE_DIR:-./ckpt/${MODEL}_dpo_lora}"
    LR="${LR:-5e-6}" MIN_LR="${MIN_LR:-0}"
    prefer_lora "$@"
}

rm_full() { # a reward model
    CKPT_SAVE_DIR="${CKPT_SAVE_DIR:-./ckpt/${MODEL}_rm}"
    LR="${LR:-5e-6}" MIN_LR="${MIN_LR:-0}"
    STAGE=rm prefer "$@"
}

rm_lora() {
    CKPT_SAVE_DIR="${CKPT_SAVE_DIR:-./ckpt/${MODEL}_rm_lora}"
    LR="${LR:-5e-5}" MIN_LR="${MIN_LR:-0}"
    STAGE=rm prefer_lora "$@"
}

generate() {
    launch inference.py \
        --hf-dir "$HF_DIR" --load "$CKPT_LOAD_DIR" --tokenizer-name-or-path "$HF_DIR" --bf16 "${PARALLEL[@]}" \
        --task ${TASK:-greedy} --predict-data "${PREDICT_DATA:-how are you?}" \
        --max-new-tokens "${MAX_NEW_TOKENS:-256}" --prompt-type auto --output-dir "${OUTPUT_DIR:-.}" --seed 42 \
        "$@"
}

chat() {
    launch inference.py \
        --hf-dir "$HF_DIR" --load "$CKPT_LOAD_DIR" --tokenizer-name-or-path "$HF_DIR" --bf16 "${PARALLEL[@]}" \
        --task chat --prompt-type auto ${ENABLE_THINKING:+--enable-thinking "$ENABLE_THINKING"} \
        --max-new-tokens "${MAX_NEW_TOKENS:-2048}" --history-turns 10 --temperature 0.6 --top-k 20 --seed 42 \
        "$@"
}

evaluate() {
    local words
    words_of "${DATA_PATH:-./mmlu/data}"
    launch evaluation.py \
        --hf-dir "$HF_DIR" --load "$CKPT_LOAD_DIR" --tokenizer-name-or-path "$HF_DIR" --bf16 "${PARALLEL[@]}" \
        --task ${TASK:-mmlu} --task-data-path "${words[@]}" --output-dir "${OUTPUT_DIR:-.}" --seed 42 \
        "$@"
}
