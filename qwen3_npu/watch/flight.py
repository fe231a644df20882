"""torch's own flight recorder of NCCL and HCCL: the state of the last collectives on the device. No torch.

It is switched on before the process groups are made, unless the user has set its variables. A thread of the backend
writes a dump when it receives data from a pipe, also while the main thread is stuck. The watcher requests it when it
reports a hang. `torchfrtrace` and torch_npu's tools read the dumps.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_CALLS = "2000"  # number of calls that are kept
_FOLDER = "qwen3_npu_flight_"
_PATIENCE = 5.0  # seconds for the dumps


class FlightRecorder(NamedTuple):
    """The variables of a backend: number of recorded calls, whether a thread monitors them, and prefixes of pipes and
    dumps (the rank is appended).
    """

    size: str
    is_on: str
    pipe: str
    dump: str


def record_flights(names: FlightRecorder) -> None:
    """Switch the recorder on for process groups that are made later."""
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER))
    os.environ.setdefault(names.size, _CALLS)
    os.environ.setdefault(names.is_on, "1")
    os.environ.setdefault(names.pipe, str(folder / "pipe_"))
    os.environ.setdefault(names.dump, str(folder / "rank_"))


def flight_files(names: FlightRecorder | None, rank: int) -> tuple[str, str]:
    """This rank's pipe and dump; "" without a recorder."""
    if names is None or names.pipe not in os.environ or names.dump not in os.environ:
        return "", ""
    return f"{os.environ[names.pipe]}{rank}.pipe", f"{os.environ[names.dump]}{rank}"


def remove_flights(files: tuple[str, str]) -> None:
    """Remove a rank's folder, if `record_flights` has made it."""
    for folder in {Path(path).parent for path in files if path}:
        if folder.name.startswith(_FOLDER):
            shutil.rmtree(folder, ignore_errors=True)


def dumped(places: Sequence[tuple[str, str]]) -> dict[str, bytes]:
    """Ask for dumps, and wait a few seconds. Args: places: pipe and dump of each rank. Returns: dump -> its content."""
    asked = []
    for pipe, dump in places:
        with contextlib.suppress(OSError):  # there is no pipe, or no process reads it any more
            descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            try:
                Path(dump).unlink(missing_ok=True)
                os.write(descriptor, b"1")
                asked.append(Path(dump))
            finally:
                os.close(descriptor)
    end = time.monotonic() + _PATIENCE
    last: dict[str, bytes] = {}
    found: dict[str, bytes] = {}
    while asked and time.monotonic() < end:
        time.sleep(0.2)
        last, found = found, {str(dump): dump.read_bytes() for dump in asked if dump.is_file()}
        if len(found) == len(asked) and found == last:
            break
    return found
