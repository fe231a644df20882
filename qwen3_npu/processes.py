"""Processes of this machine: their identity, ranks that end with their launcher, background threads. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # prctl(2)
BESIDE: set[int] = set()  # ids of the threads that are inside `beside`


@contextlib.contextmanager
def beside() -> Iterator[None]:
    """Exclude this thread from the watch: neither its calls nor its time are recorded."""
    BESIDE.add(threading.get_ident())
    try:
        yield
    finally:
        BESIDE.discard(threading.get_ident())


def started(pid: int) -> str | None:
    """When a process started, in units of this machine; None if there is no such process (or only its remains).

    Process ids are reused; id and start time together identify a process.
    """
    if sys.platform == "linux":  # where psutil's time moves when the clock is set
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # proc(5)
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in "ZX" else fields[19]
    import psutil

    try:
        return str(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None


@functools.cache
def process_table() -> str:
    """An identifier of the process table that this process sees. Containers with one host name may have several."""
    if sys.platform != "linux":
        return "one"
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def end_with_launcher() -> None:
    """Under torchrun: the kernel kills this process when torchrun is killed and cannot end it any more.

    A rank that continues alone would train and save beside the job that replaces it.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    if sys.platform == "linux":
        # On the death of the parent's thread that started this process: torchrun's main thread.
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != launcher:  # it died before the kernel knew
            os.kill(os.getpid(), signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(launcher,), daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
