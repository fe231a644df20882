#!/usr/bin/env python3
"""What one GPU does with this code: kernels right and fast, parity, step time, MFU and memory beside transformers.

    python benchmarks/gpu.py --out DIR [--budget 460] [--only kernels,dense,...] [--device cuda|cpu] [--tiny]

kernels     each operation against the reference, float32 and bfloat16, forward and gradients, fresh random inputs
parity      the certificate's rows of one process
dense       layers of Qwen3-8B, 4096 tokens, bfloat16: step time, MFU, peak memory, slowest operations. Goal: 50 % MFU
moe         layers of Qwen3-30B-A3B, the same. Goal: 25 % MFU
peer_dense  transformers with sdpa on the same shapes
peer_moe
rates       ceilings of the device, each operation beside its floor and torch's own, alternatives

As many layers as fit are trained, with their share of the vocabulary. "8 x 1": 8 micro-batches of 1 sequence to a step.
Each section is a process of its own: one that fails or takes too long leaves the others alone. DIR gets results.json.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

SECTIONS = ("kernels", "parity", "dense", "moe", "peer_dense", "peer_moe", "rates")
GOALS = {"dense": 0.5, "moe": 0.25}


class Record:
    """Results of a section; each is on disk and on the console as soon as it is known."""

    def __init__(self, file: Path) -> None:
        self.file, self.results, self.start = file, {}, time.perf_counter()

    def __call__(self, name: str, value: Any) -> None:
        self.results[name] = value
        self.file.write_text(json.dumps(self.results, indent=1))
        print(f"[{time.perf_counter() - self.start:5.1f} s] {name}: {short(value)}", flush=True)


def short(value: Any) -> str:
    """A value without its tables."""
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if k not in ("profile", "errors")}
        return ", ".join(f"{k} {short(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_section(name: str, device: str, tiny: bool, record: Callable[[str, Any], None]) -> None:
    """One of SECTIONS but parity, in this process."""
    from qwen3_npu.platform import select_platform

    platform = select_platform(device)
    platform.activate()
    import gpu_kernels
    import gpu_rates

    if name == "kernels":
        gpu_kernels.check(device, gpu_kernels.TINY if tiny else gpu_kernels.CHECKED, record)
    elif name == "rates":
        gpu_rates.rates(device, gpu_kernels.TINY if tiny else gpu_kernels.TIMED, record)
    elif name.startswith("peer_"):
        with tempfile.TemporaryDirectory() as folder:
            _runs(name.removeprefix("peer_"), tiny, record, _peer(device, Path(folder)))
    else:
        from qwen3_npu.args.parallel import RuntimeArgs
        from qwen3_npu.distributed.launch import process_group

        with process_group(platform, RuntimeArgs()) as world, tempfile.TemporaryDirectory() as folder:
            _runs(name, tiny, record, _ours(platform, world, Path(folder)))


def _ours(platform: Any, world: Any, folder: Path) -> Callable[[Any, Any], Any]:
    import gpu_layers

    return lambda shape, run: gpu_layers.ours(platform, world, folder, shape, run=run)


def _peer(device: str, folder: Path) -> Callable[[Any, Any], Any]:
    import gpu_layers

    return lambda shape, run: gpu_layers.peer(folder, shape, device, run)


def _runs(name: str, tiny: bool, record: Callable[[str, Any], None], train: Callable[[Any, Any], Any]) -> None:
    """All ways to train a shape; one that fails is named."""
    import gpu_layers

    runs = (*gpu_layers.RUNS, *([gpu_layers.Run(4, rows=2)] if name == "moe" else []))
    for run in runs[:: 2 if tiny else 1]:
        try:
            record(run.name, train(_shape(name, tiny), run))
        except Exception as error:
            record(run.name, {"failed": f"{type(error).__name__}: {error}"[:1500]})


def _shape(name: str, tiny: bool) -> Any:
    import gpu_layers

    from qwen3_npu.model.sizes import SIZES
    from qwen3_npu.parity.tiny import arch

    if tiny:
        model = dataclasses.replace(arch("moe" if name == "moe" else "untied"), num_hidden_layers=2)
        return gpu_layers.Shape(name, model, length=48, steps=1)
    return gpu_layers.Shape(name, SIZES["qwen3-30b-a3b" if name == "moe" else "qwen3-8b"], length=4096, steps=5)


def parity(args: argparse.Namespace, record: Callable[[str, Any], None], seconds: float) -> None:
    """The certificate in a process of its own."""
    command = [sys.executable, "-m", "qwen3_npu.parity", "--device", args.device, "--processes", "1"]
    done = subprocess.run(
        [*command, "--rows", "one process"], cwd=ROOT, capture_output=True, text=True, timeout=max(seconds, 20)
    )
    print(done.stdout, done.stderr[-3000:], flush=True)
    for line in done.stdout.splitlines():
        if match := re.match(r"(?:\S* )*?\s*(\S.*: .*?)\s+loss\s+(\S+)\s+gradients\s+(\S+)\s+(.*)", line):
            record(match[1], {"loss": match[2], "gradients": match[3], "verdict": match[4], "ok": match[4] == "ok"})
    record("exit status", {"rc": done.returncode, "ok": done.returncode == 0})


def conduct(args: argparse.Namespace) -> dict[str, Any]:
    """Each section in turn, while there is time; what it left behind. The first two only compare: at the same time."""
    end, found = time.perf_counter() + args.budget, {}
    together = [name for name in args.only if name in ("kernels", "parity")]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for name, result in zip(together, pool.map(lambda name: section(name, args, end), together), strict=True):
            found[name] = result
    for name in args.only:
        if name not in together:
            found[name] = section(name, args, end)
    return found


def section(name: str, args: argparse.Namespace, end: float) -> dict[str, Any]:
    """One of SECTIONS in a process of its own."""
    left = end - time.perf_counter()
    if left < 15:
        return {"section": {"failed": "no time left", "ok": False}}
    print(f"== {name}, {left:.0f} s left", flush=True)
    file, problem = args.out / f"{name}.json", None
    try:
        if name == "parity":
            parity(args, Record(file), left)
        else:
            command = [sys.executable, __file__, "--section", name, "--out", str(args.out), "--device", args.device]
            status = subprocess.run([*command, *(["--tiny"] if args.tiny else [])], timeout=left).returncode
            problem = f"exit status {status}" if status else None
    except subprocess.TimeoutExpired:
        problem = "took too long"
    found = json.loads(file.read_text()) if file.exists() else {}
    file.unlink(missing_ok=True)
    return found | ({"section": {"failed": problem, "ok": False}} if problem else {})


def table(found: dict[str, Any]) -> list[str]:
    """The report: what is wrong, then times of operations, then training beside transformers."""
    lines = []
    for section, results in found.items():
        wrong = [(n, r) for n, r in results.items() if isinstance(r, dict) and ("failed" in r or r.get("ok") is False)]
        right = sum(isinstance(r, dict) and r.get("ok") is True for r in results.values())
        lines.append(f"{section}: {right} ok, {len(wrong)} wrong" if right or wrong else f"{section}: done")
        lines += [f"  WRONG {name}: {short(result)[:300]}" for name, result in wrong]
    lines += _operations(found.get("rates", {}))
    for name, goal in GOALS.items():
        for run, result in found.get(name, {}).items():
            beside = found.get(f"peer_{name}", {}).get(run, {})
            lines += _training(f"{name} {run}", goal, result, beside) if "mfu" in result else []
    return lines


def _operations(rates: dict[str, Any]) -> list[str]:
    lines = [f"ceilings: {short(rates['ceilings'])}"] if "ceilings" in rates else []
    for name, result in rates.items():
        if name.startswith("time ") and "auto" in result:
            lines.append(f"{name[5:]:<22} floor {result['floor_ms']:6.3f} ms   ours {_pair(result['auto'])}")
            lines[-1] += f"   torch {_pair(result['torch'])}"
        elif name.startswith("time "):
            lines.append(f"{name[5:]}: {short(result)}")
    return lines


def _pair(times: dict[str, Any]) -> str:
    return f"{times['forward_ms']:6.3f} + {times['backward_ms']:6.3f}" if "forward_ms" in times else "failed"


def _training(name: str, goal: float, result: dict[str, Any], beside: dict[str, Any]) -> list[str]:
    lines = [
        f"{name:<16} {result['layers']} layers  {result['step_ms']:8.1f} ms  MFU {100 * result['mfu']:5.1f} % (goal "
        f"{100 * goal:.0f})  {result.get('peak_gib', 0):.1f} GiB   transformers: {beside.get('step_ms', '?')} ms, "
        f"MFU {100 * beside.get('mfu', 0):.1f} %, {beside.get('peak_gib', 0)} GiB"
    ]
    if profile := result.get("profile"):
        lines.append(f"  busy {profile['device_ms']} ms, idle {profile['idle_share']}, {profile['launches']} launches, "
                     f"waits {profile['waits']}")  # fmt: skip
        lines += [f"  {op['ms']:8.3f} ms {op['count']:5d} x {op['name'][:90]}" for op in profile["slowest"][:15]]
    return lines


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--budget", type=float, default=460, help="seconds for all of it")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between them")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes of a test")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(SECTIONS):
        parser.error(f"--only {','.join(sorted(unknown))}: known are {', '.join(SECTIONS)}")
    return args


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.section:
        run_section(args.section, args.device, args.tiny, Record(args.out / f"{args.section}.json"))
        return
    import torch

    found = conduct(args)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    about = {"device": device, "torch": torch.__version__, "command": " ".join(sys.argv)}
    (args.out / "results.json").write_text(json.dumps({"about": about, **found}, indent=1))
    print("\n".join([f"== {device}, torch {torch.__version__}", *table(found)]))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
