#!/usr/bin/env bash
# The main job on a tiny model, on any machine: Hugging Face weights -> Megatron shards (TP2 PP2) -> training on 4
# processes -> Hugging Face weights that transformers loads. Sets up .venv the first time. Results: outputs/quickstart
# (or the folder given: bash examples/quickstart.sh DIR). Can be run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/setup.sh
qwen3_npu_setup plot,fast matplotlib

OUT="${1:-outputs/quickstart}"
rm -rf "$OUT"
mkdir -p "$OUT"
export NPUS_PER_NODE=4 MASTER_PORT="${MASTER_PORT:-6017}" TP=2 PP=2 OMP_NUM_THREADS=1
export HF_DIR="$OUT/hf" MCORE_DIR="$OUT/mcore" HF_OUT_DIR="$OUT/hf_trained" TOKENIZER_PATH="$OUT/hf"
export INPUT=examples/quickstart/text.txt OUTPUT_PREFIX="$OUT/tales" WORKERS=1
export CKPT_LOAD_DIR="$MCORE_DIR" CKPT_SAVE_DIR="$OUT/checkpoints" DATA_PATH="$OUT/tales_text_document"
export SEQ_LENGTH=64 MBS=2 GBS=16 TRAIN_ITERS="${TRAIN_ITERS:-300}" SAVE_INTERVAL=150

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "1. a tiny random Qwen3 in the Hugging Face format"
python examples/quickstart/make_model.py --text "$INPUT" --out "$HF_DIR"
say "2. Hugging Face -> Megatron, TP2 PP2"
bash examples/qwen3/ckpt_convert_qwen3_hf2mcore.sh
say "3. text -> tokens"
bash examples/qwen3/data_convert_qwen3_pretrain.sh
say "4. training on 4 processes (this is the 14B script with tiny sizes)"
bash examples/qwen3/pretrain_qwen3_14b_4K_ptd.sh --device cpu --no-bf16 --lr 4e-3 --min-lr 4e-4 --log-interval 20
say "5. Megatron -> Hugging Face"
MCORE_DIR="$CKPT_SAVE_DIR" bash examples/qwen3/ckpt_convert_qwen3_mcore2hf.sh
say "6. the result in transformers"
python examples/quickstart/show.py --metrics "$CKPT_SAVE_DIR/tensorboard/metrics.jsonl" --model "$HF_OUT_DIR" \
    --curve "$OUT/loss.png" --prompt "The lighthouse keeper"
say "results"
echo "trained model (transformers): $OUT/hf_trained"
echo "checkpoints (Megatron):       $OUT/checkpoints"
echo "loss curve:                   $OUT/loss.png"
echo "tensorboard:                  tensorboard --logdir $OUT/checkpoints/tensorboard"
