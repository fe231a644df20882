"""Set up the watch of a rank: its state, its recorded collectives, its stacks on request, and its node's watcher."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

import qwen3_npu
from qwen3_npu import log
from qwen3_npu.args.watch import WatchArgs
from qwen3_npu.distributed import environment
from qwen3_npu.distributed.agreement import first_problem
from qwen3_npu.processes import started
from qwen3_npu.watch import flight, here, probe
from qwen3_npu.watch.collectives import COLLECTIVES, DTYPE_NAMES, Recorder
from qwen3_npu.watch.device import DeviceEvent
from qwen3_npu.watch.flight import FlightRecorder
from qwen3_npu.watch.settings import Settings
from qwen3_npu.watch.state import State
from qwen3_npu.watch.times import Times


@contextlib.contextmanager
def watched(
    args: WatchArgs,
    save: str | None,
    *,
    event: Callable[[], DeviceEvent] | None = None,
    recorder: FlightRecorder | None = None,
) -> Iterator[None]:
    """Watch this rank during the context. Every rank must enter it.

    Args:
        save: folder that all nodes share; None: each node is judged separately.
        event: makes events of the device, if collectives run on one and are not finished when `wait` returns.
        recorder: the backend's flight recorder, whose dumps a report keeps.
    """
    times = Times(event)
    if not (args.hang_timeout != 0 or args.straggler_interval) or not environment.has_rendezvous():
        with timed(times):
            yield
        return
    token = [uuid.uuid4().hex]
    dist.broadcast_object_list(token, 0)  # once, so that the processes of a node use one folder
    node, local = environment.node(), environment.local_size(dist.get_world_size())
    folder = Path(_memory()) / f"qwen3_npu_watch_{token[0]}_{node}"
    rank, _, local_rank = environment.ranks()
    info = _info(flight.flight_files(recorder, rank))
    opened = contextlib.ExitStack()
    problem = None
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        stacks = opened.enter_context(open(folder / f"rank_{rank}.stack", "w", encoding="utf-8"))
        state = State(folder, rank, info, interval=args.straggler_interval, device=event is not None)
    except OSError as error:
        problem = f"{folder.parent} takes no files: {error.strerror}"
    if _impossible(problem):
        opened.close()
        shutil.rmtree(folder, ignore_errors=True)
        with timed(times):
            yield
        return
    with opened:
        faulthandler.register(probe.STACKS, stacks, all_threads=True)
        noting = Recorder(state, times)
        noting.install()
        if local_rank == 0:
            nodes = max(dist.get_world_size() // local, 1)
            _start(_settings(args, save, folder, token[0], nodes=nodes))
        try:
            with timed(times, state):
                yield
        finally:
            noting.remove()
            faulthandler.unregister(probe.STACKS)
            state.end()


def _info(files: tuple[str, str]) -> dict[str, object]:
    """Information about this process for the watcher. Args: files: of the backend's flight recorder."""
    return {
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "node": os.uname().nodename,
        "device": environment.ranks()[2],
        "thread": threading.main_thread().ident,
        "error_file": os.environ.get("TORCHELASTIC_ERROR_FILE", ""),
        "flight": files,
        "operations": COLLECTIVES,
        "dtypes": DTYPE_NAMES,
    }


@contextlib.contextmanager
def timed(times: Times, *states: State) -> Iterator[None]:
    """Record the times of this rank during the context."""
    here.watch(*states, times)
    times.install()
    try:
        yield
    finally:
        here.watch()
        times.remove()


def _impossible(problem: str | None) -> bool:
    """Whether some rank has a problem, which is logged. Every rank must call this."""
    found = first_problem(problem)
    if found is not None:
        log.warning_once(f"no watch over hangs and stragglers: {found[1]}")
    return found is not None


def _settings(args: WatchArgs, save: str | None, folder: Path, token: str, *, nodes: int) -> Settings:
    """The settings for this node's watcher."""
    return Settings(
        folder=str(folder),
        shared=str(_shared(save, token)) if save and nodes > 1 else "",
        logs=str(Path(save or ".") / "logs"),
        node=environment.node(),
        nodes=nodes,
        local=environment.local_size(dist.get_world_size()),
        world=dist.get_world_size(),
        timeout=args.hang_timeout,
        abort=args.on_hang == "abort",
        interval=args.straggler_interval,
    )


def _start(settings: Settings) -> None:
    """Start the watcher in a separate session, so that signals to the ranks do not reach it."""
    root = str(Path(qwen3_npu.__file__).parents[1])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    subprocess.Popen(
        [sys.executable, "-m", "qwen3_npu.watch.watcher", json.dumps(dataclasses.asdict(settings))],
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,
    )


def _memory() -> str:
    """A folder in memory (such as /dev/shm), if the system has one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


def _shared(save: str, token: str) -> Path:
    folder = Path(save) / "logs" / f"watch_{token}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
