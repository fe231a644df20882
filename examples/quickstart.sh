#!/usr/bin/env bash
# The main job on a tiny model, on any machine: Hugging Face weights -> Megatron shards -> training in several processes
# -> Hugging Face weights that transformers loads. Takes NPUs or GPUs if there are any (TP2 PP2 on four, fewer on fewer),
# else 4 CPU processes; the active environment if it has torch, else .venv, made the first time (tests/setup.sh).
# Results: outputs/quickstart (or the folder given: bash examples/quickstart.sh DIR). Can be run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/setup.sh
qwen3_npu_setup quickstart,fast matplotlib transformers safetensors

OUT="${1:-outputs/quickstart}"
rm -rf "$OUT"
mkdir -p "$OUT"
if ! devices="$(python -c 'from qwen3_npu.platform import select_platform
platform = select_platform("auto").name
import torch
print(0 if platform == "cpu" else getattr(torch, platform).device_count())' 2>/dev/null)"; then # doctor repeats the error
    python -m qwen3_npu.doctor --no-all-reduce || true
    exit 1
fi
case "$devices" in
    1) layout=(NPUS_PER_NODE=1 TP=1 PP=1) ;;
    2 | 3) layout=(NPUS_PER_NODE=2 TP=2 PP=1) ;;
    *) layout=(NPUS_PER_NODE=4 TP=2 PP=2) ;;
esac
export "${layout[@]}" MASTER_PORT="${MASTER_PORT:-6017}" OMP_NUM_THREADS=1
export HF_DIR="$OUT/hf" MCORE_DIR="$OUT/mcore" HF_OUT_DIR="$OUT/hf_trained" TOKENIZER_PATH="$OUT/hf"
export INPUT=examples/quickstart/text.txt OUTPUT_PREFIX="$OUT/tales" WORKERS=1
export CKPT_LOAD_DIR="$MCORE_DIR" CKPT_SAVE_DIR="$OUT/checkpoints" DATA_PATH="$OUT/tales_text_document"
export SEQ_LENGTH=64 MBS=2 GBS=16 TRAIN_ITERS="${TRAIN_ITERS:-300}" SAVE_INTERVAL=150

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "1. a tiny random Qwen3 in the Hugging Face format"
python examples/quickstart/make_model.py --text "$INPUT" --out "$HF_DIR"
say "2. Hugging Face -> Megatron, TP$TP PP$PP"
bash examples/qwen3/ckpt_convert_qwen3_hf2mcore.sh
say "3. text -> tokens"
bash examples/qwen3/data_convert_qwen3_pretrain.sh
say "4. training in $NPUS_PER_NODE processes (this is the 14B script with tiny sizes)"
bash examples/qwen3/pretrain_qwen3_14b_4K_ptd.sh --device auto --no-bf16 --lr 4e-3 --min-lr 4e-4 --log-interval 20
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
if [ -f "$(dirname "$PYTHON")/activate" ]; then
    echo "to work in this environment:  source $(dirname "$PYTHON")/activate"
fi
