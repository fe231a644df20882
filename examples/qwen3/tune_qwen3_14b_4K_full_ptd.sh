#!/usr/bin/env bash
# Fine-tune all weights of Qwen3-14B at 4096 tokens on one node of 8 devices.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

HF_DIR="${HF_DIR:-./model_from_hf/qwen3_hf}"                   # config.json and tokenizer
CKPT_LOAD_DIR="${CKPT_LOAD_DIR:-$HF_DIR}"                      # Hugging Face or converted weights, or a checkpoint
CKPT_SAVE_DIR="${CKPT_SAVE_DIR:-./ckpt/qwen3_14b_full}"
DATA_PATH="${DATA_PATH:-./finetune_dataset/alpaca}"            # prefix of prepared data, or a raw file with --handler-name

launch pretrain_gpt.py \
    --stage sft --finetune --is-instruction-dataset --prompt-type qwen3 --variable-seq-lengths \
    --hf-dir "$HF_DIR" --load "$CKPT_LOAD_DIR" --save "$CKPT_SAVE_DIR" --data-path $DATA_PATH --split 100,0,0 \
    --tokenizer-name-or-path "$HF_DIR" \
    --tensor-model-parallel-size "${TP:-8}" --pipeline-model-parallel-size "${PP:-1}" --sequence-parallel \
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
    --seq-length "${SEQ_LENGTH:-4096}" --micro-batch-size "${MBS:-1}" --global-batch-size "${GBS:-16}" --bf16 \
    --train-iters "${TRAIN_ITERS:-2000}" --save-interval "${SAVE_INTERVAL:-2000}" \
    --lr 1.25e-6 --min-lr 1.25e-7 --lr-decay-style cosine --lr-warmup-fraction 0.01 \
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 \
    --log-interval 1 --eval-iters 0 --tensorboard-dir "$CKPT_SAVE_DIR/tensorboard" --seed 42 \
    "$@"
