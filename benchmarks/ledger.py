"""Does `python -m qwen3_npu.ledger` name what makes a training slow? Causes are put into trainings of two processes.

    python benchmarks/ledger.py [WORDS]     causes whose names hold one of the words; default: all

Prints for each cause what was named first, its share, and how much of the wall time was explained.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
EVERY = ["--global-batch-size", "8", "--micro-batch-size", "2"]
ONE = ["--global-batch-size", "2", "--micro-batch-size", "2"]
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
# cause -> (flags, what must be named); the cause's patch is `_patches`.
CAUSES: dict[str, tuple[list[str], str]] = {
    "data sleeps on rank 1": (EVERY, "slow rank in data"),
    "data sleeps on rank 0": (EVERY, "slow rank in data"),
    "data sleeps on all": (EVERY, "data"),
    "forward sleeps on rank 1": (EVERY, "slow rank in forward"),
    "forward sleeps on rank 0": (EVERY, "slow rank in forward"),
    "backward sleeps on rank 1": (EVERY, "slow rank in backward"),
    "optimizer sleeps on rank 1": (EVERY, "slow rank in optimizer"),
    "optimizer sleeps on all": (EVERY, "optimizer"),
    "reports sleep on rank 0": (EVERY, "slow rank in other"),
    "saves sleep": ([*EVERY, "--save-interval", "5"], "save"),
    "saves at every step": ([*EVERY, "--save-interval", "1"], "save"),
    "evaluations at every step": ([*EVERY, "--eval-interval", "1", "--eval-iters", "3"], "eval"),
    "evaluations sleep": ([*EVERY, "--eval-interval", "5", "--eval-iters", "1"], "eval"),
    "garbage": (EVERY, "garbage"),
    "garbage, TP2": ([*EVERY, *TP2], "garbage"),
    "slow all_reduce of dp": (EVERY, "wait dp-cp"),
    "slow all_reduce of tp": ([*EVERY, *TP2], "wait tp"),
    "one micro-batch, PP2": ([*ONE, *PP2, "--seq-length", "512"], "few micro-batches"),
    "full recompute": ([*ONE, *FULL, "--seq-length", "2048"], "recompute"),
    "tiny kernels": (["--global-batch-size", "16", "--micro-batch-size", "1", "--seq-length", "8"], "tiny kernels"),
}
STEPS = "10"


def _slow(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slow


class _Circle:
    """Garbage."""

    def __init__(self) -> None:
        self.me = self


@contextlib.contextmanager
def _patches(cause: str, t: Any, rank: int) -> Iterator[None]:
    here = "on" not in cause.split() or cause.endswith("all") or cause.endswith(f"rank {rank}")
    with contextlib.ExitStack() as stack:

        def patch(owner: Any, name: str, seconds: float) -> None:
            stack.enter_context(mock.patch.object(owner, name, _slow(getattr(owner, name), seconds)))

        if not here:
            pass
        elif cause.startswith("data"):
            patch(type(t.feed.train), "__getitem__", 0.03)
        elif cause.startswith("forward"):
            t.modules[0].register_forward_pre_hook(lambda *_: time.sleep(0.1))
        elif cause.startswith("backward"):
            t.modules[0].decoder.layers[0].mlp.linear_fc2.register_full_backward_hook(lambda *_: time.sleep(0.1))
        elif cause.startswith("optimizer"):
            patch(t.optimizer, "step_with_ready_grads", 0.3)
        elif cause.startswith("reports"):
            from qwen3_npu.training.reports.report import Reporter

            patch(Reporter, "step", 0.3)
        elif cause == "saves sleep":
            patch(t.saver, "save", 2.0)
        elif cause == "evaluations sleep":
            patch(t, "evaluate", 1.5)
        elif cause.startswith("garbage"):
            plain = t.exits.wishes

            def wishes() -> Any:
                _ = [_Circle() for _ in range(300000)]
                del _
                gc.collect()
                return plain()

            t.exits.wishes = wishes
        yield


@contextlib.contextmanager
def _slow_groups(cause: str) -> Iterator[None]:
    """All reductions of one kind of group take longer, as in a slow network."""
    from torch.distributed import ProcessGroup

    from qwen3_npu.watch.collectives import label

    plain = ProcessGroup.__dict__["allreduce"]  # looked up on the class it would not bind
    wanted = cause.rpartition(" ")[2] if cause.startswith("slow all_reduce") else ""

    def slow(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        name = label(group)
        if wanted and (name == wanted or (wanted == "dp" and name == "dp-cp")):
            time.sleep(0.02 if wanted == "tp" else 0.15)
        return plain(group, *args, **kwargs)

    ProcessGroup.allreduce = slow  # type: ignore[method-assign]
    try:
        yield
    finally:
        ProcessGroup.allreduce = plain  # type: ignore[method-assign]


def _rank(folder: Path, words: list[str]) -> None:
    """One process."""
    from qwen3_npu.platform import select_platform

    platform = select_platform("cpu")
    platform.activate()
    import torch

    from qwen3_npu.args.parallel import RuntimeArgs
    from qwen3_npu.distributed.launch import process_group
    from qwen3_npu.ledger.records import read
    from qwen3_npu.ledger.why import causes, explained, why
    from qwen3_npu.parity.measure import trainer
    from qwen3_npu.watch.collectives import Recorder
    from qwen3_npu.watch.start import timed
    from qwen3_npu.watch.state import State
    from qwen3_npu.watch.times import Times

    torch.set_num_threads(1)
    right = done = 0
    with process_group(platform, RuntimeArgs()) as world:
        for number, (cause, (flags, expected)) in enumerate(CAUSES.items()):
            if words and not any(word in cause for word in words):
                continue
            run, times = folder / str(number), Times()
            base = ["--load", str(folder / "model"), "--data-path", str(folder / "text_document"), "--device", "cpu"]
            base += [
                "--seq-length",
                "32",
                "--lr",
                "1e-3",
                "--train-iters",
                STEPS,
                "--eval-iters",
                "0",
                "--log-interval",
                "100",
            ]
            base += ["--tensorboard-dir", str(run), "--save", str(run / "save"), "--ledger-interval", STEPS]
            run.mkdir(exist_ok=True)
            (states := run / "states").mkdir(exist_ok=True)
            recorder = Recorder(State(states, world.rank, {}, interval=0, device=False), times)
            with trainer(platform, world, [*base, *flags]) as t:
                t.step()  # what the first one costs is no matter here
                with _slow_groups(cause), _patches(cause, t, world.rank):
                    recorder.install()
                    with timed(times):
                        t.train()
                    recorder.remove()
            gc.collect()
            if world.rank == 0:
                entries = read(run)
                first = causes(entries)[0]
                done, right = done + 1, right + (first.name == expected)
                verdict = "right" if first.name == expected else f"WRONG, not {expected}"
                share, told = 100 * first.share, 100 * explained(entries)
                print(f"{cause:<28} {first.name:<24} {share:5.1f} %  explained {told:5.1f} %  {verdict}", flush=True)
                if first.name != expected:
                    print("   ", [(c.name, round(c.share, 3)) for c in causes(entries)[:4]], why(entries), flush=True)
        if world.rank == 0:
            print(f"{right} of {done} named")


def main() -> None:
    if "RANK" in os.environ:
        _rank(Path(sys.argv[1]), sys.argv[2:])
        return
    from qwen3_npu.parity import tiny

    with tempfile.TemporaryDirectory() as folder:
        tiny.write_model(Path(folder) / "model", tiny.arch("tied"))
        tiny.write_tokens(Path(folder) / "text_document", documents=2000)
        command = [sys.executable, __file__, folder, *sys.argv[1:]]
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "23457", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(command, env=os.environ | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]
        sys.exit(max(rank.wait() for rank in ranks))


if __name__ == "__main__":
    main()
