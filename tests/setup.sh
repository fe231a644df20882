# Sourced by tests/run.sh and examples/quickstart.sh: an environment with the project in it.
# Uses the active virtual environment, or .venv, if the project is installed there; else makes .venv and installs.
# PYTHON chooses the interpreter for a new .venv (3.10, 3.11 or 3.12).
set -euo pipefail
QWEN3_NPU_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

qwen3_npu_ready() { # interpreter, extra modules...
    "$1" - "$QWEN3_NPU_ROOT" "${@:2}" <<'PY' >/dev/null 2>&1
import importlib.util, pathlib, sys
assert (3, 10) <= sys.version_info < (3, 13)
spec = importlib.util.find_spec("qwen3_npu")
assert spec and pathlib.Path(spec.origin).resolve().parent.parent == pathlib.Path(sys.argv[1]).resolve()
for name in ("torch", "megatron.core", "transformers", "pyarrow", *sys.argv[2:]):
    assert importlib.util.find_spec(name), name
PY
}

qwen3_npu_setup() { # extras to install, then modules of theirs that must be there
    local extras="$1"
    shift
    local python="${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}"
    if [ -n "$python" ] && (cd / && qwen3_npu_ready "$python" "$@"); then
        PATH="$VIRTUAL_ENV/bin:$PATH"
        return
    fi
    local venv="$QWEN3_NPU_ROOT/.venv"
    if ! { [ -x "$venv/bin/python" ] && (cd / && qwen3_npu_ready "$venv/bin/python" "$@"); }; then
        local found="${PYTHON:-}"
        for candidate in ${found:-python3.11 python3.12 python3.10 python3 python}; do
            if "$candidate" -c 'import sys; assert (3, 10) <= sys.version_info < (3, 13)' 2>/dev/null; then
                found="$candidate"
                break
            fi
        done
        if ! "${found:-false}" -c 'import sys; assert (3, 10) <= sys.version_info < (3, 13)' 2>/dev/null; then
            echo "Python 3.10, 3.11 or 3.12 is needed; set PYTHON to its path" >&2
            return 1
        fi
        echo "installing into $venv (once)"
        [ -x "$venv/bin/python" ] || "$found" -m venv "$venv"
        # torch first and exactly: whatever else asks for torch is then content with it.
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$QWEN3_NPU_ROOT/constraints.txt" torch
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$QWEN3_NPU_ROOT/constraints.txt" \
            -e "$QWEN3_NPU_ROOT[$extras]"
    fi
    export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
}
