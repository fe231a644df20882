# Sourced by tests/run.sh and examples/quickstart.sh: an environment with the project in it.
#   qwen3_npu_setup EXTRAS MODULE...   extras to install, then modules of theirs that must be there
# The active environment is used where it has torch, whatever made it (venv, conda, a container): what is missing there
# is installed beside its torch and torch_npu, which stay as they are. Elsewhere .venv is used, and made the first time.
# PYTHON chooses the interpreter: of the environment to use if it has torch, else to make .venv with (3.10, 3.11 or 3.12).
set -euo pipefail
QWEN3_NPU_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

qwen3_npu_ask() { # interpreter, question, arguments...; outside of the project's folder, which is importable from inside
    (cd / && "$1" - "$QWEN3_NPU_ROOT" "${@:2}") 2>/dev/null <<'PY'
import importlib.metadata, importlib.util, pathlib, re, sys

root, question, *names = sys.argv[1:]


def versions():
    named = [d for d in importlib.metadata.distributions() if d.metadata["Name"]]
    return {d.metadata["Name"].lower().replace("_", "-"): d.version for d in reversed(named)}


def numbers(version):
    return [int(n) for n in re.findall(r"\d+", version)]


def has(name):
    try:  # found, not imported: torch with torch_npu needs CANN's variables to be imported
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def is_this(spec):
    return bool(spec and spec.origin) and pathlib.Path(spec.origin).resolve().parent.parent == pathlib.Path(root).resolve()


supported = (3, 10) <= sys.version_info < (3, 13)
if question == "supported":
    sys.exit(not supported)
elif question == "has-torch":
    sys.exit(not (supported and has("torch")))
elif question == "ready":
    needed = "torch megatron.core numpy packaging psutil tokenizers safetensors pyarrow orjson xxhash jinja2 tensorboard"
    sys.exit(not (supported and all(map(has, needed.split() + names))))
elif question == "conflict":  # what is here and would have to be replaced, which may break what else uses it
    here, project = versions(), pathlib.Path(root, "pyproject.toml").read_text()
    oldest, newest = re.search(r'"torch>=([\d.]+),<([\d.]+)"', project).groups()
    megatron = re.search(r'"megatron-core==([\d.]+)"', project)[1]
    if "torch" in here and not numbers(oldest) <= numbers(here["torch"]) < numbers(newest):
        print(f"torch {here['torch']}; torch>={oldest},<{newest} is needed")
    elif here.get("megatron-core", megatron) != megatron:
        print(f"megatron-core {here['megatron-core']}; megatron-core=={megatron} is needed")
elif question == "has-this":
    sys.exit(not is_this(importlib.util.find_spec("qwen3_npu")))
elif question == "prefix":
    print(sys.prefix)
elif question == "pins":  # what is here stays as it is; what is not, comes as the tests had it
    here = versions()
    for line in pathlib.Path(root, "constraints.txt").read_text().splitlines():
        if "==" in line and line.split("==")[0].strip().lower().replace("_", "-") not in here:
            print(line)
    for name in ("torch", "torch-npu", "numpy"):
        if name in here:
            print(f"{name}=={here[name]}")
PY
}

qwen3_npu_active() { # the interpreter of the active environment, if it has torch
    local candidate
    for candidate in "${PYTHON:-}" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" \
        python python3; do
        if [ -n "$candidate" ] && qwen3_npu_ask "$candidate" has-torch; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

qwen3_npu_use() { # interpreter: first on the PATH from now on
    local prefix
    prefix="$(qwen3_npu_ask "$1" prefix)"
    export PATH="$prefix/bin:$PATH" PYTHON="$1"
    if ! qwen3_npu_ask "$1" has-this; then # not installed there, or another copy is, which stays
        export PYTHONPATH="$QWEN3_NPU_ROOT${PYTHONPATH:+:$PYTHONPATH}"
    fi
    echo "environment: $prefix"
}

qwen3_npu_pip() { # interpreter, arguments of pip install...
    "$1" -m pip install --quiet --disable-pip-version-check "${@:2}"
}

qwen3_npu_setup() { # extras, modules...
    local extras="$1" python found candidate conflict
    shift
    if [ -n "${PYTHON:-}" ]; then
        if ! command -v "$PYTHON" >/dev/null; then
            echo "error: PYTHON=$PYTHON: no such program" >&2
            return 1
        fi
        case "$PYTHON" in /*) ;; */*) PYTHON="$PWD/$PYTHON" ;; esac # what follows runs elsewhere
    fi
    if python="$(qwen3_npu_active)"; then
        conflict="$(qwen3_npu_ask "$python" conflict)"
        if [ -n "$conflict" ]; then
            echo "error: $(qwen3_npu_ask "$python" prefix) has $conflict. Install that there, or activate another" \
                "environment (without one .venv is made here)" >&2
            return 1
        fi
        if ! qwen3_npu_ask "$python" ready "$@"; then
            echo "installing what is missing into $(qwen3_npu_ask "$python" prefix); its torch stays as it is"
            qwen3_npu_pip "$python" -c <(qwen3_npu_ask "$python" pins) -e "$QWEN3_NPU_ROOT[$extras]"
        fi
        qwen3_npu_use "$python"
        return
    fi
    local venv="$QWEN3_NPU_ROOT/.venv"
    if ! { [ -x "$venv/bin/python" ] && qwen3_npu_ask "$venv/bin/python" ready "$@"; }; then
        for candidate in "${PYTHON:-}" python3.11 python3.12 python3.10 python3 python; do
            if [ -n "$candidate" ] && qwen3_npu_ask "$candidate" supported; then
                found="$candidate"
                break
            fi
        done
        if [ -z "${found:-}" ]; then
            echo "Python 3.10, 3.11 or 3.12 is needed; set PYTHON to its path" >&2
            return 1
        fi
        if [ -d /usr/local/Ascend ]; then
            echo "note: /usr/local/Ascend is here, but no environment with torch is active; $venv gets torch without" \
                "torch_npu and runs on the CPU. For NPUs activate an environment with both first: docs/npu.md" >&2
        fi
        echo "installing into $venv (once)"
        [ -x "$venv/bin/python" ] || "$found" -m venv "$venv"
        # torch first and exactly: whatever else asks for torch is then content with it.
        qwen3_npu_pip "$venv/bin/python" -c "$QWEN3_NPU_ROOT/constraints.txt" torch
        qwen3_npu_pip "$venv/bin/python" -c "$QWEN3_NPU_ROOT/constraints.txt" -e "$QWEN3_NPU_ROOT[$extras]"
    fi
    export VIRTUAL_ENV="$venv"
    qwen3_npu_use "$venv/bin/python"
}
