"""Jobs of a few gloo processes that hang in known ways, under watch. `python jobs.py FOLDER`: all of them side by side.

Each process is forked from this one, so that torch is imported once. What the ranks' watcher prints goes to
FOLDER/<job>/console, exit statuses to FOLDER/<job>/exits.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from qwen3_npu.args.watch import WatchArgs
from qwen3_npu.distributed.turns import by_turns, pass_turn
from qwen3_npu.watch import here
from qwen3_npu.watch.start import watched

RANKS, BAD, AT = 4, 2, 6  # processes, the one with the fault, the step of the fault
JOBS = {  # job -> flags, nodes
    "stopped": (WatchArgs(hang_timeout=1, on_hang="abort"), 1),
    "killed": (WatchArgs(hang_timeout=1, on_hang="report"), 1),
    "skipped": (WatchArgs(hang_timeout=1, on_hang="report"), 1),
    "skipped_in_pairs": (WatchArgs(hang_timeout=1, on_hang="report"), 1),
    "swapped": (WatchArgs(hang_timeout=1, on_hang="report"), 1),
    "sleeps": (WatchArgs(hang_timeout=1, on_hang="abort"), 1),
    "holds_the_lock": (WatchArgs(hang_timeout=1, on_hang="report"), 1),
    "second_thread": (WatchArgs(hang_timeout=1, on_hang="report"), 1),
    "maximum": (WatchArgs(hang_timeout=1, on_hang="report"), 1),
    "sleeps_on_two_nodes": (WatchArgs(hang_timeout=1, on_hang="abort"), 2),
    "lost_message": (WatchArgs(hang_timeout=1, on_hang="report"), 1),
    "wrong_shape": (WatchArgs(hang_timeout=1, on_hang="report"), 1),
    "slow": (WatchArgs(hang_timeout=1, on_hang="abort", straggler_interval=5), 1),
    "healthy": (WatchArgs(hang_timeout=1, on_hang="abort", straggler_interval=50), 1),
    "goes_on": (WatchArgs(hang_timeout=1, on_hang="report"), 1),
}
ENDING = ("killed", "stopped", "sleeps", "sleeps_on_two_nodes", "slow", "healthy", "goes_on")


def read_slowly() -> None:
    """The stack of a rank with this fault names this function."""
    time.sleep(60)


def hold_the_lock() -> None:
    """In C, without letting other threads of Python run."""
    ctypes.PyDLL(None).sleep(60)


def turn(*, faulty: bool) -> None:
    """One of two computations by turns."""
    pass_turn()
    if faulty:
        read_slowly()
    dist.all_reduce(torch.ones(4))


def step(job: str, number: int, rank: int, pair: dist.ProcessGroup) -> None:
    """One step of a job; the fault is in step AT of rank BAD."""
    faulty = number == AT and rank == BAD
    here.at("data")
    if faulty and job == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if faulty and job == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if faulty and job.startswith("sleeps"):
        read_slowly()
    if faulty and job == "holds_the_lock":
        hold_the_lock()
    if faulty and job == "goes_on":
        time.sleep(3)
    here.at("forward")
    if job == "slow":
        time.sleep(0.03 if rank == BAD else 0.01)
    x, y = torch.ones(4), torch.empty(16)
    if faulty and job == "swapped":
        dist.all_gather_into_tensor(y, x)
        dist.all_reduce(x)
        return
    if faulty and job == "wrong_shape":
        x = torch.ones(5)
    if not (faulty and job.startswith("skipped")):
        is_other = faulty and job == "maximum"
        work = dist.all_reduce(x, dist.ReduceOp.MAX if is_other else dist.ReduceOp.SUM, async_op=True)
        work.wait()
    if faulty and job == "maximum":
        read_slowly()
    here.at("backward")
    if job == "second_thread":
        by_turns(lambda: turn(faulty=False), lambda: turn(faulty=faulty), lambda _: lambda: None)
    if job == "skipped_in_pairs":
        dist.all_reduce(x, group=pair)
    elif job == "lost_message":
        if rank == 0 or (rank == BAD and not faulty):
            dist.batch_isend_irecv([dist.P2POp(dist.isend if rank else dist.irecv, x, BAD - rank)])[0].wait()
    else:
        dist.all_gather_into_tensor(y, x)
    here.step_done(number)


def worker(job: str, rank: int, folder: Path) -> None:
    """One rank."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # it ends with this program
    flags, nodes = JOBS[job]
    local = RANKS // nodes
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank % local), "MASTER_ADDR": "here"}
    os.environ |= {"LOCAL_WORLD_SIZE": str(local), "GROUP_RANK": str(rank // local)}
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / f"error_{rank}.json")
    console = os.open(folder / "console", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(console, 1)
    os.dup2(console, 2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    pair = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][rank // 2]
    with watched(flags, str(folder)):
        for number in range(1, 400 if job == "healthy" else 30 if job == "slow" else 8):
            step(job, number, rank, pair)
            if job == "healthy" and number in (100, 200):
                with here.during("save" if number == 100 else "eval"):
                    here.at("forward")  # as evaluation does
                    time.sleep(1.5 if rank == 0 else 0)
                    dist.barrier()
        if job == "lost_message":
            dist.barrier()


def main() -> None:
    root, pids = Path(sys.argv[1]), {}
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: torch.device("cpu")  # as `platform.cpu_redirect` has it
    for job in sys.argv[2:] or JOBS:
        folder = root / job
        folder.mkdir()
        for rank in range(RANKS):
            pid = os.fork()
            if pid == 0:
                try:
                    worker(job, rank, folder)
                finally:
                    os._exit(1 if sys.exc_info()[0] else 0)
            pids[pid] = (job, rank)
    exits: dict[str, dict[int, int]] = {}
    deadline = time.monotonic() + 40
    while pids and time.monotonic() < deadline:
        statuses = {}
        for pid in pids:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        for pid in statuses:
            job, rank = pids.pop(pid)
            exits.setdefault(job, {})[rank] = statuses[pid]
        for pid, (job, _) in pids.items():
            if job not in ENDING and list((root / job / "logs").glob("hang_*/rank_0.txt")):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    (root / "exits.json").write_text(json.dumps(exits))


if __name__ == "__main__":
    main()
