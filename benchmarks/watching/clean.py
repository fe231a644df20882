#!/usr/bin/env python3
"""Does anything warn of a training in which nothing is wrong, and is its time explained? Prints JSON.

    python benchmarks/watching/clean.py [--steps 10000] [--processes 2] [--kind untied|moe] [-- MORE FLAGS]

A small model learns the bytes of this repository's texts, with checkpoints and evaluations every 20th of the steps,
pauses of 4 and 6 s between steps, --hang-timeout 15, --spike-guard skip (so each step checks the state) and replicas
compared every 50 steps. `alarms`: warnings; `spikes`: steps that were taken for one; `explained`: the share of the wall
clock that `python -m qwen3_npu.ledger` gives a name. More flags: --tensor-model-parallel-size 2, --lora-r 8, ...
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

FLAGS = ["--seq-length", "64", "--micro-batch-size", "2", "--lr", "1e-3", "--device", "cpu"]
FLAGS += ["--lr-decay-style", "cosine", "--lr-warmup-iters", "100", "--eval-iters", "2", "--split", "98,2,0"]
FLAGS += ["--save-total-limit", "2", "--log-interval", "100", "--no-bf16", "--use-distributed-optimizer"]
FLAGS += ["--spike-guard", "skip", "--replica-check-interval", "50", "--hang-timeout", "15", "--ledger-interval", "100"]


def train() -> None:
    """One process: pretrain_gpt.py with pauses."""
    import pretrain_gpt
    from qwen3_npu.platform import select_platform

    select_platform("cpu").activate()
    from qwen3_npu.training.loop import Trainer

    plain = Trainer.step

    def step(self: Trainer) -> Any:
        number = self.position.iteration + 1
        steps = self.args.train.steps
        if number % max(7 * steps // 100, 150) == 0 and os.environ["RANK"] == "0":  # more often it is a straggler
            time.sleep(4)
        if number % max(11 * steps // 100, 70) == 0:
            time.sleep(6)
        return plain(self)

    Trainer.step = step  # type: ignore[method-assign]
    pretrain_gpt.main()


def main() -> None:
    if "--trainer" in sys.argv:
        del sys.argv[1]
        return train()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kind", choices=["untied", "tied", "moe"], default="untied")
    parser.add_argument("flags", nargs="*", help="of the training, after --")
    args = parser.parse_args()
    import numpy as np

    from qwen3_npu.data.train.token_file import IndexedWriter, publish
    from qwen3_npu.ledger.records import read
    from qwen3_npu.ledger.why import explained, total, why
    from qwen3_npu.parity.tiny import arch, write_model

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_model(root / "model", arch(args.kind, num_hidden_layers=2))
        text = b"\n".join(path.read_bytes() for path in sorted(ROOT.rglob("*")) if path.suffix in (".py", ".md"))
        tokens = np.frombuffer(text, np.uint8).astype(np.int32) % 254 + 2
        writer = IndexedWriter(root / "text")
        writer.add(tokens[: len(tokens) // 2000 * 2000], np.full(len(tokens) // 2000, 2000, np.int32))
        publish([writer])
        flags = ["--load", str(root / "model"), "--data-path", str(root / "text"), "--save", str(root / "save")]
        flags += ["--tensorboard-dir", str(root / "tb"), "--train-iters", str(args.steps), *FLAGS]
        flags += ["--global-batch-size", str(2 * args.processes), *args.flags]
        flags += [word for name in ("--eval-interval", "--save-interval") for word in (name, str(args.steps // 20))]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*command, str(args.processes), __file__, "--trainer", *flags],
            env=environment,
            capture_output=True,
            text=True,
        )
        if not (root / "tb" / "metrics.jsonl").is_file():
            sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
        lines = [json.loads(line) for line in (root / "tb" / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        entries = read(root / "tb")
    kinds, seconds = total(entries)
    warnings = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("warning:")]
    found = {"exit": done.returncode, "steps": len(losses), "loss": losses[-1], "alarms": len(warnings)}
    found |= {"spikes": sum("spike" in line for line in lines), "said": warnings[:5], "why": why(entries)}
    found |= {"explained": round(explained(entries), 4), "seconds": round(seconds, 1)}
    found |= {"shares": {kind: round(value / seconds, 4) for kind, value in sorted(kinds.items())}}
    print(json.dumps(found, indent=1))
    return None


if __name__ == "__main__":
    main()
