#!/usr/bin/env python3
"""What recording costs a training: CPU time of steps that are recorded and that are not, in turns. Prints JSON.

    python benchmarks/watching/cost.py [--pairs 12] [--layout --tensor-model-parallel-size 2 --sequence-parallel]

A dense model of 4 layers with hidden size 512 is trained by pretrain_gpt.py on two processes, with sequences of 512
tokens. Six steps are recorded as usual (positions and collectives, for the watch and the ledger), then six are not;
each first step is left out. The time is that of the thread that trains. `ratio`: the median over pairs of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

STEPS = 6  # in a row with recording, and without


def measured(pairs: int, layout: list[str]) -> dict[str, object]:
    """What rank 0 of a training says."""
    from qwen3_npu.parity.tiny import arch, write_model, write_tokens

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sizes = {"hidden_size": 512, "intermediate_size": 1536, "head_dim": 64, "vocab_size": 2048}
        write_model(root / "model", arch("untied", **sizes))
        write_tokens(root / "text")
        flags = ["--load", str(root / "model"), "--data-path", str(root / "text"), "--split", "1,0,0", "--no-bf16"]
        flags += ["--seq-length", "512", "--global-batch-size", "2", "--train-iters", str(2 * STEPS * pairs)]
        flags += ["--lr", "1e-3", "--eval-iters", "0", "--device", "cpu", "--log-interval", "1000", *layout]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COST": str(root / "cost.json")}
        done = subprocess.run([*command, __file__, "--trainer", *flags], env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        found: dict[str, object] = json.loads((root / "cost.json").read_text())
    return found


def train() -> None:
    """pretrain_gpt.py, which records some of its steps."""
    import pretrain_gpt
    from benchmarks.watching.switch import Switch
    from qwen3_npu.platform import select_platform
    from qwen3_npu.training.step import StepResult

    switch = Switch()
    select_platform("cpu").activate()
    from qwen3_npu.training.loop import Trainer

    plain = Trainer.step
    took: list[float] = []

    def step(self: Trainer) -> StepResult:
        if not took:
            switch.learn()
        switch.turn(len(took) // STEPS % 2 == 0)
        began = time.thread_time()
        result = plain(self)
        took.append(time.thread_time() - began)
        switch.turn(True)
        return result

    Trainer.step = step  # type: ignore[method-assign]
    pretrain_gpt.main()
    runs = [statistics.median(took[at + 1 : at + STEPS]) for at in range(0, len(took), STEPS)]
    ratios = sorted(round(recorded / other, 4) for recorded, other in zip(runs[::2], runs[1::2], strict=True))
    if os.environ["RANK"] == "0":
        found = {"ratio": statistics.median(ratios), "of_all": ratios, "step_ms": round(1000 * runs[1], 1)}
        Path(os.environ["COST"]).write_text(json.dumps(found))


def main() -> None:
    if "--trainer" in sys.argv:
        sys.argv.remove("--trainer")
        return train()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--layout", nargs=argparse.REMAINDER, default=["--tensor-model-parallel-size", "2"])
    args = parser.parse_args()
    print(json.dumps({"pairs": args.pairs, "layout": args.layout} | measured(args.pairs, args.layout), indent=1))
    return None


if __name__ == "__main__":
    main()
