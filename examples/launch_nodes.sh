#!/usr/bin/env bash
# Start a script of examples/ on every host of a file (a host a line; # comments and "slots=8" are ignored), over ssh:
#   bash examples/launch_nodes.sh HOSTFILE examples/qwen3/pretrain_qwen3_32b_4K_ptd.sh [flags...]
# The first host is the master. All hosts see this folder under the same path and have the same Python at hand (set
# PYTHON, or activate it in the remote shell's start-up). Variables that the scripts read, and those of HCCL, CANN and
# torch_npu, go along. Each line of output begins with its host. When a host fails, the others are stopped.
# SSH is the command that runs something on a host (default: ssh with -tt, so that what it runs ends with it).
set -euo pipefail

usage() { echo "usage: launch_nodes.sh HOSTFILE SCRIPT [flags...]" >&2; exit 2; }
[ $# -ge 2 ] || usage
hostfile="$1" script="$2"
shift 2
[ -f "$hostfile" ] || { echo "launch_nodes.sh: $hostfile: no such file" >&2; exit 2; }
[ -f "$script" ] || { echo "launch_nodes.sh: $script: no such file" >&2; exit 2; }
read -ra ssh <<<"${SSH:-ssh -tt -o BatchMode=yes}"
mapfile -t hosts < <(sed 's/#.*//' "$hostfile" | awk 'NF { print $1 }')
[ ${#hosts[@]} -gt 0 ] || { echo "launch_nodes.sh: $hostfile: no host in it" >&2; exit 2; }

examples="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
names="$(grep -ohE '\$\{?[A-Z][A-Z_0-9]*' "$script" "$examples/common.sh" "$examples/recipes.sh" | tr -d '${' | sort -u)"
names+=" $(compgen -e | grep -E '^(HCCL|ASCEND|CANN|ACL|NPU|PYTORCH|TORCH|CUDA|NCCL|GLOO|TASK_QUEUE|CPU_AFFINITY|STREAMS|COMBINED|MULTI_STREAM|INF_NAN|OMP)_|^LD_PRELOAD$' || true)"
along=()
for name in $names; do
    case $name in NNODES | NODE_RANK | MASTER_ADDR | BASH_SOURCE | PWD) continue ;; esac
    if [ -n "${!name+set}" ]; then along+=("$name=${!name}"); fi
done

processes=()
stop() {
    trap - EXIT INT TERM
    for process in "${processes[@]}"; do kill -TERM -- "-$process" 2>/dev/null || true; done
}
trap stop EXIT INT TERM
set -m # a process group for each host, so that all of it can be stopped
for rank in "${!hosts[@]}"; do
    remote=(cd "$PWD" "&&" env "${along[@]@Q}" "NNODES=${#hosts[@]}" "NODE_RANK=$rank"
        "MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}}" bash "${script@Q}" "${@@Q}")
    { "${ssh[@]}" "${hosts[rank]}" "${remote[*]}" 2>&1 </dev/null | sed -u "s/^/${hosts[rank]}: /"; } &
    processes+=("$!")
done
for _ in "${processes[@]}"; do
    status=0
    wait -n || status=$?
    if [ "$status" -ne 0 ]; then
        echo "launch_nodes.sh: a host ended with status $status; stopping the others" >&2
        exit "$status"
    fi
done
