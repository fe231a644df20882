#!/usr/bin/env bash
# Set up (once) and run all tests, or those given: bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/setup.sh
qwen3_npu_setup dev,fast pytest ruff mypy peft lm_eval
if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    mypy
fi
exec python -m pytest "$@"
