#!/usr/bin/env python3
"""Is a poisoned step caught? Twenty trainings of a tiny model, each poisoned once. Prints JSON.

    python benchmarks/watching/spikes.py [--seed 0]

Samples of random tokens, of one token all along, with shifted labels, with a mask that is NaN; one update with 1000
times the learning rate; one bit flipped, of an exponent or a mantissa, in a weight or a moment. Right: --spike-guard
rollback says so in that step or in one of the two after it. `alarms`: spikes in 300 steps of a training without any.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

BATCH = 8
FLAGS = ["--seq-length", "32", "--global-batch-size", str(BATCH), "--micro-batch-size", "4", "--lr", "3e-3"]
FLAGS += ["--lr-decay-style", "constant", "--device", "cpu", "--eval-iters", "0", "--split", "1,0,0", "--no-bf16"]
FLAGS += ["--spike-guard", "rollback", "--save-interval", "20", "--save-total-limit", "2"]
POISONS = [*["random", "same", "shifted"] * 3, "nan", "nan", "rate", *["weight", "exp_avg", "exp_avg_sq", "weight"] * 2]


class Poisoned:
    """A data set some of whose samples are rubbish."""

    def __init__(self, plain: Any, kind: str, numbers: range, draw: random.Random) -> None:
        self.plain, self.kind, self.numbers, self.draw = plain, kind, numbers, draw

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def __getitem__(self, number: int) -> Any:
        import torch

        sample = self.plain[number]
        if number not in self.numbers:
            return sample
        length = len(sample["tokens"])
        if self.kind == "random":
            drawn = torch.tensor([self.draw.randrange(2, 256) for _ in range(length + 1)])
            return {**sample, "tokens": drawn[:-1], "labels": drawn[1:]}
        if self.kind == "same":
            same = torch.full_like(sample["tokens"], 7)
            return {**sample, "tokens": same, "labels": same}
        if self.kind == "shifted":
            return {**sample, "labels": sample["labels"].roll(5)}
        return {**sample, "loss_mask": torch.full_like(sample["loss_mask"], float("nan"))}


def flip(trainer: Any, kind: str, draw: random.Random) -> None:
    """One bit of a random weight or moment."""
    import torch

    from qwen3_npu.checkpoint.training.optimizer_state import parts

    states = [pair for part in parts(trainer.optimizer) for pair in part.optimizer.state.items()]
    main, state = draw.choice(states)
    bits = (main if kind == "weight" else state[kind]).detach().view(-1).view(torch.int32)
    bits[draw.randrange(len(bits))] ^= 1 << draw.randrange(31)


@contextlib.contextmanager
def training(root: Path, flags: list[str]) -> Iterator[Any]:
    from qwen3_npu.distributed.launch import process_group
    from qwen3_npu.parity.measure import trainer, training_args
    from qwen3_npu.platform import select_platform

    platform = select_platform("cpu")
    with tempfile.TemporaryDirectory() as save:
        given = ["--load", str(root / "model"), "--data-path", str(root / "text"), *FLAGS, "--save", save, *flags]
        with process_group(platform, training_args(given).runtime) as world, trainer(platform, world, given) as made:
            yield made


def caught(root: Path, kind: str, draw: random.Random) -> int | None:
    """Steps after the poisoned one until it is caught; None: it is not."""
    at = draw.randrange(30, 60)
    with training(root, ["--train-iters", "80"]) as t:
        t.saver.save(t.position)
        held = t.feed.train.dataset
        if kind in ("random", "same", "shifted", "nan"):
            t.feed.train.dataset = Poisoned(held, kind, range((at - 1) * BATCH, at * BATCH), draw)
        for number in range(1, at + 3):
            rates = [group["lr"] for group in t.optimizer.param_groups]
            if number == at and kind == "rate":
                for group in t.optimizer.param_groups:
                    group["lr"] *= 1000
            if number == at and kind in ("weight", "exp_avg", "exp_avg_sq"):
                flip(t, kind, draw)
            before = t.position.iteration
            t.step()
            if t.position.iteration <= before:
                return number - at
            for group, rate in zip(t.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(set(POISONS)))
    args = parser.parse_args()
    from qwen3_npu.platform import select_platform

    select_platform("cpu").activate()
    from qwen3_npu.parity.tiny import arch, write_model, write_tokens

    draw, found = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_model(root / "model", arch("tied", num_hidden_layers=2))
        write_tokens(root / "text", documents=2000)
        for kind in POISONS if args.only is None else [args.only]:
            found.append({"poison": kind, "steps": caught(root, kind, draw)})
            print(json.dumps(found[-1]), file=sys.stderr)
        with training(root, ["--train-iters", "300"]) as t:
            alarms = sum(t.step().spike is not None for _ in range(300))
    right = sum(one["steps"] is not None and one["steps"] >= 0 for one in found)
    print(json.dumps({"poisoned": len(found), "caught": right, "alarms": alarms, "of_all": found}, indent=1))


if __name__ == "__main__":
    main()
