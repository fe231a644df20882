# Sourced by the scripts beside it. Defines
#   launch SCRIPT FLAGS...   start SCRIPT on every device of this node under torchrun (NNODES > 1: once per node)
#   run SCRIPT FLAGS...      start SCRIPT as one process on the host
# From the environment: NPUS_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT PYTHON; DRY_RUN=1 only checks and prints;
# DEVICE_TABLE.
# The exit status is the program's. Output also goes to logs/ in the current directory.
set -euo pipefail

QWEN3_NPU="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
NPUS_PER_NODE="${NPUS_PER_NODE:-8}"
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
MASTER_ADDR="${MASTER_ADDR:-localhost}"
MASTER_PORT="${MASTER_PORT:-6000}"
if [ -z "${PYTHON:-}" ]; then
    PYTHON="$(command -v python || command -v python3 || echo python)"
    # The environment that tests/setup.sh made, where none with torch is active.
    if [ -x "$QWEN3_NPU/.venv/bin/python" ] && ! "$PYTHON" -c 'from importlib import util; assert util.find_spec("torch")' 2>/dev/null; then
        PYTHON="$QWEN3_NPU/.venv/bin/python"
        echo "environment: $QWEN3_NPU/.venv" >&2
    fi
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # what torchrun would set, without its warning

with_log() { # command...
    local log="logs/$(basename "$0" .sh)_node${NODE_RANK}.log"
    if ! mkdir -p logs || ! : >"$log"; then
        echo "warning: $PWD/$log cannot be written; there is no log" >&2
        "$@"
        return
    fi
    echo "log: $PWD/$log"
    set +e  # a log that cannot be written any more does not change the program's status
    "$@" 2>&1 | tee "$log"
    local status="${PIPESTATUS[0]}"
    set -e
    return "$status"
}

run() {
    local command=("$PYTHON" "$QWEN3_NPU/$1" "${@:2}")
    if [ -n "${DRY_RUN:-}" ]; then
        echo "${command[@]@Q}"
        return
    fi
    with_log "${command[@]}"
}

launch() {
    local world=$((NPUS_PER_NODE * NNODES))
    local script="$QWEN3_NPU/$1"
    # What `python -m qwen3_npu.plan --learn` wrote in this folder, or DEVICE_TABLE names; DEVICE_TABLE= : nothing.
    local table="${DEVICE_TABLE-device_table.json}"
    if [ "$1" = pretrain_gpt.py ] && [ -n "$table" ] && { [ -n "${DEVICE_TABLE:-}" ] || [ -f "$table" ]; }; then
        echo "plan: constants of this cluster from $table" >&2
        set -- "$@" --device-table "$table"
    fi
    # Mistakes in flags, model, layout and data show here in a second, as one line and exit status 2.
    local check=(env WORLD_SIZE="$world" "$PYTHON" "$script" "${@:2}" --dry-run)
    if [ -n "${DRY_RUN:-}" ]; then "${check[@]}"; else "${check[@]}" >/dev/null; fi
    local command=("$PYTHON" -m torch.distributed.run --nproc-per-node "$NPUS_PER_NODE" --nnodes "$NNODES"
        --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" "$script" "${@:2}")
    if [ -n "${DRY_RUN:-}" ]; then
        echo "${command[@]@Q}"
        return
    fi
    # torchrun shows a port in use, and torch_npu without CANN, as 30 lines of traceback.
    env PYTHONPATH="$QWEN3_NPU" MASTER_ADDR="$MASTER_ADDR" MASTER_PORT="$MASTER_PORT" NODE_RANK="$NODE_RANK" "$PYTHON" -c '
import os
from importlib.util import find_spec
from qwen3_npu import cli
from qwen3_npu.distributed.environment import check_meeting

def check():
    check_meeting(os.environ["NODE_RANK"] == "0")
    if find_spec("torch_npu") and "ASCEND_HOME_PATH" not in os.environ:
        import torch

cli.run("launch", check)'
    with_log "${command[@]}"
}
