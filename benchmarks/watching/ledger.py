#!/usr/bin/env python3
"""Does the ledger name what a step's time is lost to? Causes injected into small gloo jobs; a training on a device.

    python benchmarks/watching/ledger.py [--only causes device] [--steps 40]

`causes`: 22 jobs of two processes, each slow in one way: a rank, all ranks, a collective of one group, checkpoints,
garbage collection, padding, ... Right: `python -m qwen3_npu.ledger` would say so first. `gap`: points of share between
what was injected (by a clock of its own) and what the ledger says; only where seconds are injected.
`device`: a model of about 0.2 B parameters is trained on this machine's NPU or GPU, with 8 x 2048 tokens and with 64
tokens a step (which leave the device waiting for the host's launches), and the ledger's table is shown.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

FACTS: dict[str, Any] = {"pipeline": 1, "virtual": 1, "micro_batches": 4, "micro_tokens": 8192, "layers": 4}
FACTS |= {"recompute": "none", "async_save": False, "manual_gc": False}
WORK = {"data": 0.001, "forward": 0.006, "backward": 0.012, "reduce": 0.001, "optimizer": 0.002, "other": 0.0005}
MORE = 0.02  # seconds that are injected into a step
GROUPS = {  # megatron's description -> the ledger's name
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "DATA_PARALLEL_GROUP": "dp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_DATA_PARALLEL_GROUP": "edp",
}


@dataclasses.dataclass(frozen=True)
class Injection:
    """One way to be slow.

    Attributes:
        phase: is longer, on all ranks or on rank 1 `alone`.
        group: whose collective is slow.
        facts: what the flags would be.
        padding, imbalance: of the tokens.
        cause: what the ledger must say; its share is the injected one less `free`.
    """

    cause: str
    phase: str = ""
    group: str = ""
    alone: bool = False
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    padding: float = 0.0
    imbalance: float = 0.0
    free: float = 0.0


INJECTIONS = {
    "data": Injection("data", "data"),
    # What is injected sleeps; between steps (other) that is a pause.
    **{
        f"{phase} on one rank": Injection(f"slow rank in {'pause' if phase == 'other' else phase}", phase, alone=True)
        for phase in WORK
    },
    "optimizer": Injection("optimizer", "optimizer", free=0.1),
    "checkpoints": Injection("save", "save"),
    "evaluations": Injection("eval", "eval"),
    "garbage": Injection("garbage", "garbage"),
    **{f"collectives of {n}": Injection(f"wait {n}", group=n) for n in GROUPS.values() if n != "pp"},
    "few micro-batches": Injection("few micro-batches", group="pp", facts={"pipeline": 8, "micro_batches": 4}),
    "uneven stages": Injection("uneven stages", group="pp", facts={"pipeline": 2, "micro_batches": 256}),
    "padding": Injection("padding", padding=0.6),
    "imbalance": Injection("imbalance", imbalance=4.0),
    "recompute": Injection("recompute", facts={"recompute": "full"}),
    "tiny kernels": Injection("tiny kernels", facts={"micro_tokens": 128, "micro_batches": 32}),
}


class Garbage:
    """Part of a ring, which only the collector frees."""

    def __init__(self) -> None:
        self.ring: Any = self


def collect() -> None:
    held = [Garbage() for _ in range(40_000)]
    del held
    gc.collect()


def rank(injection: Injection, number: int, folder: Path, steps: int) -> None:
    """One rank of a job; rank 0 writes metrics.jsonl and what was injected."""
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import Work

    from qwen3_npu.args.watch import WatchArgs
    from qwen3_npu.training.reports.ledger import Ledger
    from qwen3_npu.training.step import NOTHING
    from qwen3_npu.watch import here
    from qwen3_npu.watch.start import watched

    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"GROUP_RANK": "0", "MASTER_ADDR": "here"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
    groups = {name: dist.new_group([0, 1], group_desc=desc) for desc, name in GROUPS.items()}
    plain, injected, slow = Work.wait, 0.0, [False]

    def wait(work: Any, *args: Any) -> Any:  # as if the network were slow
        time.sleep(MORE if slow[0] else 0)
        return plain(work, *args)

    Work.wait = wait
    gc.disable()
    tally = dataclasses.replace(NOTHING, places=1000.0, real_tokens=1000 * (1 - injection.padding))
    load: Any = types.SimpleNamespace(imbalance=torch.tensor([injection.imbalance])) if injection.imbalance else None
    x, is_mine = torch.ones(8), not injection.alone or number == 1
    with watched(WatchArgs(hang_timeout=60), str(folder)):
        ledger = Ledger(steps, FACTS | injection.facts, torch.device("cpu"))
        began = time.perf_counter()
        for step in range(1, steps + 1):
            for phase, seconds in WORK.items():
                here.at(phase)
                time.sleep(seconds)
                at = time.perf_counter()
                if phase == injection.phase and is_mine:
                    time.sleep(MORE)
                if phase == "forward" and injection.phase == "garbage":
                    collect()
                if phase == "backward" and injection.group:
                    slow[0] = True
                    dist.all_reduce(x, group=groups[injection.group])
                    slow[0] = False
                injected += time.perf_counter() - at
            dist.all_reduce(x, group=groups["dp"])
            if injection.phase in ("save", "eval"):
                at = time.perf_counter()
                with here.during(injection.phase):
                    time.sleep(MORE)
                injected += time.perf_counter() - at
            here.step_done(step)
            record = ledger.step(step, tally, load, last=step == steps)
        share = injected / (time.perf_counter() - began)
    if number == (1 if injection.alone else 0):
        (folder / "injected").write_text(str(share))
    if number == 0:
        (folder / "metrics.jsonl").write_text(json.dumps({"step": steps, "ledger": record}) + "\n")


def causes(steps: int) -> dict[str, Any]:
    from qwen3_npu.ledger.records import read
    from qwen3_npu.ledger.why import causes as found_in
    from qwen3_npu.ledger.why import explained

    found = {}
    for name, injection in INJECTIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            pids = []
            for number in range(2):
                pid = os.fork()
                if pid == 0:
                    try:
                        rank(injection, number, Path(folder), steps)
                    finally:
                        sys.stderr.flush()
                        os._exit(1 if sys.exc_info()[0] else 0)
                pids.append(pid)
            assert not any(os.waitpid(pid, 0)[1] for pid in pids), name
            entries = read(Path(folder))
            first = found_in(entries)[0]
            entry = {"said": first.name, "right": first.name == injection.cause, "share": round(first.share, 3)}
            if injection.phase or (injection.group and injection.group != "pp"):
                share = float(Path(folder, "injected").read_text()) - injection.free
                entry["gap"] = round(100 * abs(first.share - share), 1)
            found[name] = entry | {"explained": round(explained(entries), 3)}
            print(name, json.dumps(found[name]), file=sys.stderr)
    return {
        "injected": len(found),
        "right": sum(entry["right"] for entry in found.values()),
        "largest_gap": max(entry.get("gap", 0.0) for entry in found.values()),
        "least_explained": min(entry["explained"] for entry in found.values()),
        "wrong": {name: entry for name, entry in found.items() if not entry["right"]},
    }


def device() -> dict[str, Any]:
    from qwen3_npu.parity.tiny import arch, write_model, write_tokens

    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 16}
    sizes |= {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 16384, "max_position_embeddings": 4096}
    said: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_model(root / "model", arch("untied", **sizes))
        write_tokens(root / "text", vocab=16384, documents=12000)
        for case, length, rows in (("8 x 2048 tokens", 2048, 8), ("64 tokens", 64, 1)):
            flags = ["--load", str(root / "model"), "--data-path", str(root / "text"), "--seq-length", str(length)]
            flags += ["--global-batch-size", str(rows), "--micro-batch-size", str(min(rows, 4)), "--split", "1,0,0"]
            flags += ["--train-iters", "30", "--lr", "1e-4", "--bf16", "--eval-iters", "0", "--log-interval", "10"]
            flags += ["--tensorboard-dir", str(root / case), "--ledger-interval", "10"]
            for command in ([str(ROOT / "pretrain_gpt.py"), *flags], ["-m", "qwen3_npu.ledger", str(root / case)]):
                paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
                environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
                done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
                print(f"== {case}", done.stdout[-2500:], done.stderr[-1500:], sep="\n", flush=True)
            lines = [json.loads(line) for line in (root / case / "metrics.jsonl").read_text().splitlines()]
            records = [line["ledger"] for line in lines if "ledger" in line]
            said[case] = {key: records[-1][key] for key in ("seconds", "mean", "host")}
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", nargs="+", choices=["causes", "device"], default=["causes"])
    args = parser.parse_args()
    found: dict[str, Any] = {}
    if "device" in args.only:
        found["device"] = device()
    if "causes" in args.only:
        from qwen3_npu.platform import select_platform

        select_platform("cpu").activate()
        import qwen3_npu.training.reports.ledger  # noqa: F401  once, before the forks

        found["causes"] = causes(args.steps)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
