#!/usr/bin/env python3
"""Does the watch name the culprit? Faults in small gloo jobs, a long healthy job, and what watching costs. Prints JSON.

    python benchmarks/watch.py [--injections 50] [--processes 8] [--steps 10000] [--pairs 10] [--only faults ...]

`faults`: each job has one fault, in a random rank and step, and --hang-timeout 2: a rank stopped (SIGSTOP), killed
(SIGKILL), one that skips a collective, swaps two, sleeps in data, is 3 times slower, has another shape, or a whole node
that is silent with its watcher. Right: the one verdict names kind, rank and call, a sleeping rank's function too.
`verdict_s` counts from the fault, `exit_s` from the verdict until every process has ended. `resume`: a training whose
rank is stopped is ended, started again by torchrun and compared with one that was not. `alarms`: warnings in a healthy
job with pauses for checkpoints, evaluations and a slow step now and then. `overhead`: CPU time of steps of ten times
5 ms of work and two collectives (14B at TP8 has a collective in 3 ms of its step), noted and not noted in turns; the
ratio of the medians, and the watcher's share of a core.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks.watching.switch import Switch  # noqa: E402
from qwen3_npu.args.watch import WatchArgs  # noqa: E402
from qwen3_npu.watch import here  # noqa: E402
from qwen3_npu.watch.start import watched  # noqa: E402

# Fault -> what the console must say; R is the rank.
FAULTS = {
    "stopped": r"rank R \(.*does not run: it is stopped",
    "killed": r"rank R \(.*is dead",
    "skipped": r"order mismatch at call #\d+ of group world: rank R",
    "swapped": r"order mismatch at call #\d+ of group world: rank R",
    "sleeps": r"rank R \(.*never entered all_reduce #\d+ of group world.*read_slowly",
    "slow": r"rank R \(.*(straggler|times the median)|straggler.*rank R \(",
    "wrong_shape": r"mismatch in all_reduce #\d+ of group world: rank R",
    "silent_node": r"node 1 of 2 gave no report",
}
LIMIT = 92.0  # seconds that a job with a fault may take: 2 + 60 until the verdict, 30 until the end


def read_slowly() -> None:
    time.sleep(120)


def fault(job: str, folder: Path) -> None:
    """In the rank that has it."""
    (folder / "began").write_text(str(time.time()))
    if job == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif job == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif job == "sleeps":
        read_slowly()


def silence(folder: Path) -> None:
    """A rank of node 1: its watcher is killed, and it stops."""
    (folder / "began").write_text(str(time.time()))
    for child in psutil.Process().children():
        child.kill()
    os.kill(os.getpid(), signal.SIGSTOP)


def step(job: str, faulty: bool, seconds: float) -> None:
    """Its two collectives, after the work."""
    here.at("forward")
    time.sleep(seconds)
    x, y = torch.ones(5 if faulty and job == "wrong_shape" else 4), torch.empty(4 * dist.get_world_size())
    if faulty and job == "swapped":
        dist.all_gather_into_tensor(y, x)
        dist.all_reduce(x)
        return
    if not (faulty and job == "skipped"):
        dist.all_reduce(x, async_op=True).wait()
    here.at("backward")
    dist.all_gather_into_tensor(y, x)


def run_job(job: str, rank: int, size: int, folder: Path, *, bad: int, at: int) -> None:
    """All steps of one rank."""
    if job in ("healthy", "slow"):
        return run_long(job, rank, bad, at)
    for number in range(1, at + 3):
        here.at("data")
        faulty = rank == bad and number == at
        if faulty:
            fault(job, folder)
        if job == "silent_node" and number == at and rank >= size // 2:
            silence(folder)
        step(job, faulty, 0.01)
        here.step_done(number)
    time.sleep(LIMIT)
    return None


def run_long(job: str, rank: int, bad: int, steps: int) -> None:
    """A job that ends by itself."""
    for number in range(1, (60 if job == "slow" else steps) + 1):
        here.at("data")
        step(job, False, 0.03 if job == "slow" and rank == bad else 0.01 if job == "slow" else 0)
        here.step_done(number)
        if job == "healthy" and number % 500 == 0:
            with here.during("save" if number % 1000 else "eval"):
                time.sleep(2.5 if rank == 0 else 0)
                dist.barrier()
        if job == "healthy" and number % 700 == 0:
            time.sleep(1.0)  # as if something were compiled again


def fork(job: str, size: int, folder: Path, *, bad: int, at: int) -> list[int]:
    """Start the ranks; their process ids."""
    nodes = 2 if job == "silent_node" else 1
    flags = WatchArgs(hang_timeout=2, on_hang="abort", straggler_interval=10 if job == "slow" else 100)
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            try:
                local = size // nodes
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank % local)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(local), "GROUP_RANK": str(rank // local), "MASTER_ADDR": "here"}
                console = os.open(folder / "console", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(console, 1)
                os.dup2(console, 2)
                dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
                with watched(flags, str(folder)):
                    run_job(job, rank, size, folder, bad=bad, at=at)
            finally:
                os._exit(1 if sys.exc_info()[0] else 0)
        pids.append(pid)
    return pids


def wait(pids: list[int], limit: float, console: Path, *, rest: int = 0) -> tuple[float | None, float]:
    """When the first warning was there, and when all but the last `rest` had ended; what has not is killed."""
    warned, alive, began = None, set(pids), time.time()
    while alive - set(pids[len(pids) - rest :]) and time.time() - began < limit:
        alive -= {pid for pid in alive if os.waitpid(pid, os.WNOHANG)[0]}
        if warned is None and console.exists() and "warning:" in console.read_text():
            warned = time.time()
        time.sleep(0.05)
    ended = time.time()
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    while warned is None and time.time() - ended < 10:  # a job may be over before its watcher has looked once
        warned = time.time() if console.exists() and "warning:" in console.read_text() else None
        time.sleep(0.05)
    return warned, max(ended, warned or 0.0)


def faults(injections: int, size: int, seed: int) -> dict[str, Any]:
    """All kinds in turn."""
    draw, found = random.Random(seed), []
    for number in range(injections):
        job = list(FAULTS)[number % len(FAULTS)]
        bad, at = draw.randrange(size), draw.randrange(3, 20)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            rest = size // 2 if job == "silent_node" else 0  # which its own torchrun would end
            pids = fork(job, size, folder, bad=bad, at=at)
            warned, ended = wait(pids, LIMIT, folder / "console", rest=rest)
            said = (folder / "console").read_text() if (folder / "console").exists() else ""
            begun = float((folder / "began").read_text()) if (folder / "began").exists() else None
        is_right = re.search(FAULTS[job].replace("R", str(bad)), said, re.S) is not None
        entry: dict[str, Any] = {"fault": job, "rank": bad, "step": at, "right": is_right}
        if warned is not None:
            entry |= {
                "verdict_s": round(warned - begun, 2) if begun else None,
                "exit_s": round(max(ended - warned, 0.0), 2),
            }
        if not is_right:
            entry["said"] = said[-400:]
        found.append(entry)
        print(json.dumps(entry), file=sys.stderr)
    timed = [entry for entry in found if entry.get("verdict_s") is not None]
    return {
        "injections": injections,
        "right": sum(entry["right"] for entry in found),
        "slowest_verdict_s": max((entry["verdict_s"] for entry in timed), default=None),
        "slowest_exit_s": max((entry["exit_s"] for entry in timed), default=None),
        "wrong": [entry for entry in found if not entry["right"]],
    }


def alarms(steps: int, size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name), time.time()
        _, ended = wait(fork("healthy", size, folder, bad=0, at=steps), 3600, folder / "console")  # and 10 s more
        said = (folder / "console").read_text()
        return {
            "steps": steps,
            "alarms": said.count("warning:"),
            "seconds": round(ended - began, 1),
            "said": said[:300],
        }


def overhead(pairs: int, size: int) -> dict[str, Any]:
    """Of one set of processes, which step with and without the watch in turns."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    done = subprocess.run([*command, __file__, "--stepper", str(pairs)], capture_output=True, text=True, check=True)
    return {"pairs": pairs, **json.loads(done.stdout.splitlines()[-1])}


def stepper(pairs: int) -> None:
    """CPU time of the same work, ten steps noted and ten not in turns: neighbours see the same load of the machine.

    It is the time of the thread that computes and notes; gloo's threads wait for the other process in a loop.
    """
    dist.init_process_group("gloo")
    work, products = torch.ones(330, 330), 0
    began = time.process_time()
    while time.process_time() - began < 0.5:
        work @ work
        products += 1
    count = [max(products // 100, 1)]  # of about 5 ms
    dist.broadcast_object_list(count, 0)
    switch = Switch()
    ratios, found = [], {}
    with watched(WatchArgs(hang_timeout=60), None):
        switch.learn()
        for _ in range(pairs):
            took: dict[bool, list[float]] = {True: [], False: []}
            for block in range(16):
                is_noted = block % 2 == 0
                switch.turn(is_noted)
                for number in range(12):
                    began = time.thread_time()
                    here.at("data")
                    for _ in range(10):
                        for _ in range(count[0]):
                            work @ work
                        step("", False, 0)
                    here.step_done(12 * block + number + 1)
                    if number >= 2:  # Python has found the methods again
                        took[is_noted].append(time.thread_time() - began)
            ratios.append(round(statistics.median(took[True]) / statistics.median(took[False]), 4))
        found = {"ratio": statistics.median(ratios), "of_all": sorted(ratios)}
        found["step_ms"] = round(1000 * statistics.median(took[False]), 2)
        if watchers := psutil.Process().children():
            began, before = time.perf_counter(), sum(watchers[0].cpu_times()[:2])
            time.sleep(10)
            found["watcher_of_a_core"] = round((sum(watchers[0].cpu_times()[:2]) - before) / 10, 4)
        dist.barrier()
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def resume() -> dict[str, Any]:
    """Losses of a training that was stopped, ended and started again, beside one that was not."""
    from qwen3_npu.parity.tiny import arch, write_model, write_tokens

    losses = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_model(root / "model", arch("untied"))
        write_tokens(root / "text")
        for stops in (False, True):
            out = root / ("stopped" if stops else "whole")
            flags = [
                "--load",
                str(root / "model"),
                "--data-path",
                str(root / "text"),
                "--seq-length",
                "32",
                "--no-bf16",
            ]
            flags += ["--global-batch-size", "4", "--train-iters", "8", "--lr", "1e-3", "--eval-iters", "0"]
            flags += [
                "--save",
                str(out),
                "--save-interval",
                "2",
                "--tensorboard-dir",
                str(out / "tb"),
                "--device",
                "cpu",
            ]
            flags += ["--hang-timeout", "5", "--log-interval", "1", "--split", "1,0,0"]
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "STOPS": str(int(stops))}
            script = [__file__, "--trainer", "--", *flags]
            done = subprocess.run([*command, "--max-restarts", "1", *script], env=env, capture_output=True, text=True)
            if done.returncode:
                return {"failed": done.stderr[-600:]}
            lines = [json.loads(line) for line in (out / "tb" / "metrics.jsonl").read_text().splitlines()]
            losses[stops] = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return {"steps": len(losses[True]), "same": losses[True] == losses[False], "loss": list(losses[True].values())[-1]}


def train_and_stop() -> None:
    """pretrain_gpt.py, whose rank 1 stops in step 5 of the first start."""
    import pretrain_gpt
    from qwen3_npu.platform import select_platform

    select_platform("cpu").activate()
    from qwen3_npu.training.loop import Trainer

    plain = Trainer.step

    def with_stop(self: Trainer) -> Any:
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if os.environ["STOPS"] == "1" and first and os.environ["RANK"] == "1" and self.position.iteration == 4:
            os.kill(os.getpid(), signal.SIGSTOP)
        return plain(self)

    Trainer.step = with_stop  # type: ignore[method-assign]
    pretrain_gpt.main()


def main() -> None:
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    if "--stepper" in sys.argv:
        return stepper(int(sys.argv[2]))
    if "--trainer" in sys.argv:
        del sys.argv[1 : sys.argv.index("--") + 1]
        return train_and_stop()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--injections", type=int, default=50)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parts = ["faults", "resume", "alarms", "overhead"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    args = parser.parse_args()
    runs = {
        "faults": lambda: faults(args.injections, args.processes, args.seed),
        "resume": resume,
        "alarms": lambda: alarms(args.steps, args.processes),
        "overhead": lambda: overhead(args.pairs, min(args.processes, 2)),
    }
    print(json.dumps({"processes": args.processes} | {name: runs[name]() for name in args.only}, indent=1))
    return None


if __name__ == "__main__":
    main()
