"""Information of the operating system about a process that may not answer: state, kernel function, Python stacks."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path

from qwen3_npu.processes import started

STACKS = signal.SIGUSR2  # a rank answers with its stacks, in C, even while its main thread is inside a collective
_PATIENCE = 2.0  # seconds for the stacks
_TURNS = "distributed/turns.py"  # where a thread waits for its turn (--moe-fb-overlap)
_WRAPPERS = ("torch/", "typing_extensions.py", "contextlib.py", _TURNS)  # frames that are left out
_BRIEF = 0.3  # seconds over which the CPU time is measured


@dataclasses.dataclass(frozen=True)
class Process:
    """One process, seen from outside.

    Attributes:
        alive: whether the process exists, and is not another one with the same id.
        state: R, S, D, T or t as in proc(5); "" if unknown.
        waits_in: kernel function in which it waits; "" if unknown.
        computes: whether it used a CPU, or was ready to, during most of a short interval.
    """

    alive: bool
    state: str = ""
    waits_in: str = ""
    computes: bool = False


def probe_processes(pids: dict[int, tuple[int, str]]) -> dict[int, Process]:
    """rank -> (process id, `processes.started` of it)  =>  rank -> process."""
    before = {rank: _ticks(pid) for rank, (pid, _) in pids.items()}
    states = {rank: _field(pid, "State") for rank, (pid, _) in pids.items()}
    time.sleep(_BRIEF)
    found = {}
    for rank, (pid, since) in pids.items():
        if not is_alive(pid, since):
            found[rank] = Process(False)
            continue
        ticks = _ticks(pid) - before[rank]
        state = _field(pid, "State")
        # Where processors are scarce a running process may wait for one all the time.
        computes = ticks / os.sysconf("SC_CLK_TCK") > _BRIEF / 2 or state == states[rank] == "R"
        if state == "D" != states[rank]:  # a single access to a disk is no hang
            state = "S"
        found[rank] = Process(True, state, _text(pid, "wchan").strip("0"), computes)
    return found


def is_alive(pid: int, since: str) -> bool:
    """Whether the process still exists, and is not another one with its id."""
    return started(pid) == since


def ask_stacks(pids: dict[int, int], folder: Path) -> dict[int, str]:
    """rank -> process id  =>  rank -> the stacks of all its threads; "" if it does not answer."""
    files = {rank: folder / f"rank_{rank}.stack" for rank in pids}
    sizes = {rank: file.stat().st_size if file.is_file() else 0 for rank, file in files.items()}
    for pid in pids.values():
        try:
            os.kill(pid, STACKS)
        except ProcessLookupError:
            continue
    end = time.monotonic() + _PATIENCE
    texts = dict.fromkeys(pids, "")
    while time.monotonic() < end:
        time.sleep(0.1)
        last = texts
        texts = {rank: _from(file, sizes[rank]) for rank, file in files.items()}
        if all(texts.values()) and texts == last:
            break
    return texts


def place(stack: str, thread: int) -> tuple[str, str]:
    """The position of a thread in faulthandler's text: the innermost place, and the innermost one outside torch.

    Returns:
        Two strings "file:line (function)", often equal; "" if the thread is missing.
    """
    frames = _threads(stack).get(thread, [])
    outer = [frame for frame in frames if not frame.startswith(_WRAPPERS) and "/threading.py:" not in frame]
    return (frames[0] if frames else ""), (outer[0] if outer else frames[0] if frames else "")


def whose_turn(stack: str, main: int) -> int:
    """The thread that may go on: the main one, or the one for which the main one waits in `distributed.turns`."""
    threads = _threads(stack)

    def waits(frames: list[str]) -> bool:
        return next((f for f in frames if "/threading.py:" not in f), "").startswith(_TURNS)

    if not waits(threads.get(main, [])):
        return main
    others = [n for n, frames in threads.items() if not waits(frames) and any(f.startswith(_TURNS) for f in frames)]
    return others[0] if len(others) == 1 else main


def _threads(stack: str) -> dict[int, list[str]]:
    """Thread -> its frames, "file:line (function)", the innermost first; without those of `watch.collectives`."""
    threads: dict[int, list[str]] = {}
    frames: list[str] = []
    for line in stack.splitlines():
        if "(most recent call first)" in line:
            frames = threads[int(line[line.index("0x") :].split()[0], 16)] = []
        elif line.startswith("  File "):
            path, _, rest = line.removeprefix('  File "').rpartition('", line ')
            number, _, function = rest.partition(" in ")
            if not path.endswith("watch/collectives.py"):
                frames.append(f"{_short(path)}:{number} ({function})")
    return threads


def is_waiting(stack: str) -> bool | None:
    """Whether a thread is inside a call of torch.distributed (`collectives` makes them). None: there is no text."""
    lines = stack.splitlines()
    heads = [lines[i + 1] for i, line in enumerate(lines[:-1]) if "(most recent call first)" in line]
    return any("watch/collectives.py" in line for line in heads) if heads else None


def _short(path: str) -> str:
    """The part of a path that starts with its package."""
    for mark in ("/site-packages/", "/qwen3_npu/"):
        _, found, tail = path.rpartition(mark)
        if found:
            return tail
    return path


def _from(file: Path, at: int) -> str:
    try:
        with open(file, "rb") as opened:
            opened.seek(at)
            return opened.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _text(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:  # ended, another system, or not for us to read
        return ""


def _field(pid: int, name: str) -> str:
    for line in _text(pid, "status").splitlines():
        if line.startswith(f"{name}:"):
            return line.split()[1]
    return ""


def _ticks(pid: int) -> int:
    """CPU time so far, in clock ticks."""
    fields = _text(pid, "stat").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12]) if len(fields) > 12 else 0
