#!/usr/bin/env bash
# LoRA fine-tuning of Qwen3-14B at 4096 tokens on one node of 8 devices.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

HF_DIR="${HF_DIR:-./model_from_hf/qwen3_hf}"                   # config.json and tokenizer
CKPT_LOAD_DIR="${CKPT_LOAD_DIR:-$HF_DIR}"                      # Hugging Face or converted weights
CKPT_SAVE_DIR="${CKPT_SAVE_DIR:-./ckpt/qwen3_14b_lora}"        # the updates; the weights stay where they are
DATA_PATH="${DATA_PATH:-./finetune_dataset/alpaca}"            # prefix of prepared data, or a raw file with --handler-name

launch pretrain_gpt.py \
    --stage sft --finetune --is-instruction-dataset --prompt-type qwen3 --variable-seq-lengths \
    --hf-dir "$HF_DIR" --load "$CKPT_LOAD_DIR" --save "$CKPT_SAVE_DIR" --data-path $DATA_PATH --split 100,0,0 \
    --tokenizer-name-or-path "$HF_DIR" \
    --lora-r "${LORA_R:-16}" --lora-alpha "${LORA_ALPHA:-32}" --lora-ckpt-filter \
    --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2 \
    --tensor-model-parallel-size "${TP:-2}" --pipeline-model-parallel-size "${PP:-2}" --sequence-parallel \
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
    --seq-length "${SEQ_LENGTH:-4096}" --micro-batch-size "${MBS:-4}" --global-batch-size "${GBS:-64}" --bf16 \
    --train-iters "${TRAIN_ITERS:-2000}" --save-interval "${SAVE_INTERVAL:-2000}" \
    --lr 1.25e-5 --min-lr 1.25e-7 --lr-decay-style cosine --lr-warmup-fraction 0.01 \
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 \
    --log-interval 1 --eval-iters 0 --tensorboard-dir "$CKPT_SAVE_DIR/tensorboard" --seed 42 \
    "$@"
