#!/usr/bin/env python3
"""How long a checkpoint holds up training, at once and with --async-save, in both formats. Prints JSON.

    python benchmarks/save.py [--processes 2] [--repeats 3]

A model of 117 M parameters (hidden 768, 12 layers, vocabulary 32768) with its optimizer's state, 1.9 GB, float32, on 2
data-parallel processes with --use-distributed-optimizer. `held_s`: until training goes on; `whole_s`: until the
checkpoint is visible; medians. Target: with --async-save at most 0.2 of the time without.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from qwen3_npu.args.parallel import RuntimeArgs  # noqa: E402
from qwen3_npu.model.arch import parameter_count  # noqa: E402
from qwen3_npu.model.sizes import SIZES  # noqa: E402
from qwen3_npu.parity.tiny import write_model, write_tokens  # noqa: E402

ARCH = dataclasses.replace(
    SIZES["qwen3-0.6b"],
    vocab_size=32768,
    hidden_size=768,
    intermediate_size=2304,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=512,
)


def worker(repeats: int, flags: list[str]) -> None:
    """One rank: a step, then a checkpoint several times; rank 0 prints the seconds."""
    from qwen3_npu.distributed.launch import process_group
    from qwen3_npu.platform import select_platform

    platform = select_platform("cpu")
    platform.activate()
    from qwen3_npu.parity.measure import trainer

    with process_group(platform, RuntimeArgs()) as world, trainer(platform, world, flags) as made:
        made.step()
        held, whole = [], []
        for _ in range(repeats):
            torch.distributed.barrier()
            start = time.perf_counter()
            made.saver.save(made.position)
            held.append(time.perf_counter() - start)
            made.saver.finish()
            whole.append(time.perf_counter() - start)
        if world.rank == 0:
            print(json.dumps({"held_s": statistics.median(held), "whole_s": statistics.median(whole)}))


def measure(folder: Path, args: argparse.Namespace, ckpt_format: str, extra: list[str]) -> dict[str, float]:
    flags = ["--device", "cpu", "--eval-iters", "0", "--split", "1,0,0", "--lr", "1e-4", "--train-iters", "1"]
    flags += ["--seq-length", "64", "--load", str(folder / "model"), "--data-path", str(folder / "text_document")]
    flags += ["--use-distributed-optimizer", "--save", str(folder / "save"), "--ckpt-format", ckpt_format, *extra]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    command += [__file__, "--worker", str(args.repeats), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(int(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    found: dict[str, object] = {"command": " ".join(sys.argv), "torch": torch.__version__}
    found["parameters"] = parameter_count(ARCH)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", ARCH)
        write_tokens(folder / "text_document", vocab=ARCH.vocab_size)
        for ckpt_format in ("torch", "torch_dist"):
            sync = measure(folder, args, ckpt_format, [])
            background = measure(folder, args, ckpt_format, ["--async-save"])
            found[ckpt_format] = {
                **{f"sync_{what}": round(seconds, 2) for what, seconds in sync.items()},
                **{f"async_{what}": round(seconds, 2) for what, seconds in background.items()},
                "ratio_held": round(background["held_s"] / sync["held_s"], 3),
                "target": 0.2,
            }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
