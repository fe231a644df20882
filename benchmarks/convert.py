#!/usr/bin/env python3
"""How fast and how small `convert_ckpt.py` is, beside copying the same bytes in the same run. Prints JSON.

    python benchmarks/convert.py [--sizes qwen3-0.6b qwen3-1.7b] [--folder DIR] [--repeats 3] [--jobs N]

For each size a Hugging Face directory with random bfloat16 weights is made. Then, in turns: `cp` of the weights and
fsync of the copies; Hugging Face to Megatron at TP2 PP2; that back to Hugging Face. Whole processes are timed, start-up
included; what is converted was read before (page cache). Targets:
  seconds   <= 1.5 x cp + 3 s
  memory    <= 400 MB + 3 x the largest tensor of the output x processes; the sum of every process's own peak
"""

from __future__ import annotations

import argparse
import filecmp
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qwen3_npu.args.convert import TargetArgs  # noqa: E402
from qwen3_npu.checkpoint.binary.dtypes import BF16  # noqa: E402
from qwen3_npu.checkpoint.binary.safetensors import SafetensorsWriter  # noqa: E402
from qwen3_npu.checkpoint.convert.run import target_layout  # noqa: E402
from qwen3_npu.checkpoint.formats.huggingface import plan_files, write_config, write_weight_index  # noqa: E402
from qwen3_npu.checkpoint.mapping.table import hf_shapes, shards  # noqa: E402
from qwen3_npu.model.arch import Qwen3Arch  # noqa: E402
from qwen3_npu.model.sizes import SIZES  # noqa: E402

TP, PP = 2, 2
LAYOUT = ["--target-tensor-parallel-size", str(TP), "--target-pipeline-parallel-size", str(PP)]


def make_model(folder: Path, arch: Qwen3Arch) -> None:
    """A Hugging Face directory with random bits for weights."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    shapes = hf_shapes(arch)
    sizes = {name: math.prod(shape) * BF16.itemsize for name, shape in shapes.items()}
    files = plan_files(sizes, 5 * 10**9)
    for file, names in files.items():
        writer = SafetensorsWriter(folder / file, {name: (BF16, shapes[name]) for name in names})
        for name in names:
            writer.write(name, np.frombuffer(rng.bytes(sizes[name]), BF16.carrier).reshape(shapes[name]))
        writer.close()
    write_weight_index(folder, files, sum(sizes.values()))
    write_config(arch, None, folder, BF16)


def copied(source: Path, target: Path) -> float:
    """Seconds of `cp` of the weights and fsync of every copy."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in target.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    return time.perf_counter() - start


def own_peak(pid: int) -> int:
    """Bytes a process had resident at most so far (VmHWM)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def converted(flags: list[str]) -> tuple[float, int, int]:
    """Seconds, sum of the peaks of all processes in bytes, and their number."""
    peaks: dict[int, int] = {}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "convert_ckpt.py"), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            family = [parent.pid, *(child.pid for child in parent.children(recursive=True))]
        except psutil.NoSuchProcess:
            break
        for pid in family:
            peaks[pid] = max(peaks.get(pid, 0), own_peak(pid))
        time.sleep(0.02)
    errors = process.communicate()[1].decode()
    if process.returncode:
        raise SystemExit(f"convert_ckpt.py {' '.join(flags)} failed:\n{errors}")
    return time.perf_counter() - start, sum(peaks.values()), len(peaks)


def measure(name: str, folder: Path, repeats: int, extra: list[str]) -> dict[str, Any]:
    """Times, ratios and peaks of one model size."""
    arch = SIZES[name]
    source = folder / "hf"
    make_model(source, arch)
    layout = target_layout(arch, TargetArgs(target_tensor_parallel_size=TP, target_pipeline_parallel_size=PP))
    largest = {
        "hf to mg": max(math.prod(s.shape) for rank in layout.ranks() for s in shards(arch, layout, rank)),
        "mg to hf": max(map(math.prod, hf_shapes(arch).values())),
    }
    seconds: dict[str, list[float]] = {"cp": [], **{direction: [] for direction in largest}}
    peaks: dict[str, list[tuple[int, int]]] = {direction: [] for direction in largest}
    for number in range(repeats):
        mg, hf, copy = folder / f"mg{number}", folder / f"back{number}", folder / f"copy{number}"
        seconds["cp"].append(copied(source, copy))
        shutil.rmtree(copy)
        for direction, flags in {
            "hf to mg": ["--save-model-type", "mg", "--load-dir", str(source), "--save-dir", str(mg), *LAYOUT],
            "mg to hf": [
                "--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", str(mg), "--save-dir", str(hf)
            ],
        }.items():  # fmt: skip
            took, peak, processes = converted(flags + extra)
            seconds[direction].append(took)
            peaks[direction].append((peak, processes))
        if not all(filecmp.cmp(file, hf / file.name, shallow=False) for file in source.glob("*.safetensors")):
            raise SystemExit("the way there and back changed the weights")
        shutil.rmtree(mg)
        shutil.rmtree(hf)
    cp = statistics.median(seconds["cp"])
    result: dict[str, Any] = {"bytes": sum(map(math.prod, hf_shapes(arch).values())) * 2, "cp_s": round(cp, 2)}
    result["cp_s_all"] = [round(s, 2) for s in seconds["cp"]]
    for direction, tensor in largest.items():
        took = statistics.median(seconds[direction])
        peak, processes = max(peaks[direction])
        jobs = min(max(1, processes - 2), processes)  # beside the writers: their parent and what Python adds to it
        allowed = 400e6 + 3 * tensor * BF16.itemsize * jobs
        result[direction] = {
            "s": round(took, 2),
            "s_all": [round(s, 2) for s in seconds[direction]],
            "ratio_to_cp": round(took / cp, 2),
            "target_s": round(1.5 * cp + 3, 2),
            "in_time": took <= 1.5 * cp + 3,
            "jobs": jobs,
            "largest_tensor_mb": round(tensor * BF16.itemsize / 1e6, 1),
            "peak_rss_mb": round(peak / 1e6),
            "target_rss_mb": round(allowed / 1e6),
            "in_memory": peak <= allowed,
        }
    shutil.rmtree(source)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["qwen3-0.6b", "qwen3-1.7b"], choices=list(SIZES))
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the system's temporary folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--jobs", type=int, help="of convert_ckpt.py; default: its own")
    args = parser.parse_args()
    extra = ["--jobs", str(args.jobs)] if args.jobs else []
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "cpus": os.cpu_count()},
    }
    for name in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            report[name] = measure(name, Path(folder), args.repeats, extra)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
