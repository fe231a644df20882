#!/usr/bin/env bash
# Set up (once) and run all tests, or those given: bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/setup.sh
qwen3_npu_setup dev,fast pytest ruff mypy peft lm_eval trl datasets transformers safetensors
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
ruff check .
ruff format --check .
mypy
# Two halves side by side: processes that train together spend a third of their time waiting for each other.
python -m pytest tests/parallel > >(sed -u 's/^/parallel: /') 2>&1 &
parallel=$!
trap 'kill "$parallel"' EXIT
status=0
python -m pytest tests --ignore tests/parallel || status=$?
wait "$parallel" || status=$?
trap - EXIT
exit "$status"
