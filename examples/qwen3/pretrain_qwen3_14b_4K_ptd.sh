#!/usr/bin/env bash
# Pretrain Qwen3-14B at 4096 tokens on one node of 8 devices.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

HF_DIR="${HF_DIR:-./model_from_hf/qwen3_hf}"             # config.json and tokenizer
CKPT_LOAD_DIR="${CKPT_LOAD_DIR:-./model_weights/qwen3_mcore}"  # converted weights, a checkpoint, or $HF_DIR itself
CKPT_SAVE_DIR="${CKPT_SAVE_DIR:-./ckpt/qwen3_14b}"
DATA_PATH="${DATA_PATH:-./dataset/enwiki_text_document}"

launch pretrain_gpt.py \
    --hf-dir "$HF_DIR" --load "$CKPT_LOAD_DIR" --save "$CKPT_SAVE_DIR" --data-path $DATA_PATH --split 100,0,0 \
    --tensor-model-parallel-size "${TP:-8}" --pipeline-model-parallel-size "${PP:-1}" --sequence-parallel \
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
    --seq-length "${SEQ_LENGTH:-4096}" --micro-batch-size "${MBS:-4}" --global-batch-size "${GBS:-128}" --bf16 \
    --train-iters "${TRAIN_ITERS:-2000}" --save-interval "${SAVE_INTERVAL:-2000}" \
    --lr 1.25e-6 --min-lr 1.25e-7 --lr-decay-style cosine --lr-warmup-fraction 0.01 \
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --init-method-std 0.01 \
    --log-interval 1 --eval-iters 0 --tensorboard-dir "$CKPT_SAVE_DIR/tensorboard" --seed 42 \
    "$@"
