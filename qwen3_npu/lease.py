"""Leases: only one process at a time may write an output. No torch.

A lease is a small file in or beside the output. It names the process that writes there, and its time of modification
changes every few seconds as a sign of life. It works on every file system that can create a file exclusively, also
across machines; clocks are never compared. If both processes see the same process table, it tells whether the holder
lives; else its signs of life do. The lease of a dead holder is taken over, and the log says so.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import NamedTuple

from qwen3_npu import log, schema
from qwen3_npu.errors import Stopped, UsageError, printable
from qwen3_npu.files import flush
from qwen3_npu.processes import process_table, started

HEARTBEAT = 10.0  # seconds between signs of life
PATIENCE = 60.0  # seconds without one until a holder on another machine is taken for dead
_LOOK = 0.2  # seconds between checks of a lease whose holder may be dead


@dataclasses.dataclass(frozen=True)
class LeaseHolder:
    """The process that a lease belongs to.

    Attributes:
        processes: the process table of `pid`.
        started: start time of the process (`processes.started`).
        since: time at which it took the lease, for messages.
        token: unique for this lease.
    """

    host: str
    processes: str
    pid: int
    started: str
    since: str
    token: str

    @staticmethod
    def me() -> LeaseHolder:
        """This process."""
        pid, now = os.getpid(), datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        return LeaseHolder(
            socket.gethostname(), process_table(), pid, started(pid) or "", since=now, token=uuid.uuid4().hex
        )

    @staticmethod
    def parse(text: str) -> LeaseHolder | None:
        """The holder in a lease file; None if the text is incomplete or no record of a holder."""
        try:
            read = schema.record(schema.parse_json(text.encode(), "a lease"), "a lease")
            words = {f.name: read.text(f.name) for f in dataclasses.fields(LeaseHolder) if f.name != "pid"}
            return LeaseHolder(pid=read.integer("pid", least=0), **words)
        except UsageError:
            return None

    def __str__(self) -> str:
        return printable(f"process {self.pid} on {self.host} (since {self.since})")


class _Seen(NamedTuple):
    """A lease file at one moment: its text and its sign of life."""

    text: str
    beat: int


def folder_lease(folder: Path, flag: str) -> Lease:
    """The lease of a folder that `flag` names. See `Lease`."""
    return Lease(folder / ".lease", f"{flag} {folder}", f"choose another {flag}")


class Lease:
    """Held from construction to `release`, or as a context.

    Args:
        path: of the lease file; its folder is made if needed.
        what: the output, for messages.
        remedy: what the user can do instead of waiting.
        wait: wait while another (living) process holds it.

    Raises:
        UsageError: another process holds it (without `wait`), or the file cannot be written.
    """

    def __init__(self, path: Path, what: str, remedy: str, *, wait: bool = False) -> None:
        self.path, self.what, self.remedy, self.wait, self.me = path, what, remedy, wait, LeaseHolder.me()
        self._stop = threading.Event()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._take_over()
        except OSError as error:
            raise UsageError(f"{what} cannot be written: {path}: {error.strerror}; {remedy}") from None
        self._thread = threading.Thread(target=self._beat, name=f"lease {path}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """Check that the lease is still held. Call it before each write to the shared output.

        Raises:
            Stopped: another process holds the lease, because this process was considered dead.
        """
        holder = self._holder()
        if holder is None:  # removed by hand
            self._create()
            holder = self._holder()
        if holder is None or holder.token != self.me.token:
            raise Stopped(
                f"{self.what} now belongs to {holder}: this process gave no sign of life for {PATIENCE:.0f} s and was "
                f"taken for dead; nothing more is written there"
            )

    def release(self) -> None:
        """Release the lease. Does nothing in a process that was forked from the holder, or if called again."""
        self._stop.set()
        holder = self._holder()
        if os.getpid() == self.me.pid and holder is not None and holder.token == self.me.token:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Create the lease file. False if there is one already."""
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with open(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(self.me)))
            flush(file)
        return True

    def _holder(self) -> LeaseHolder | None:
        seen = _look(self.path)
        return LeaseHolder.parse(seen.text) if seen else None

    def _take_over(self) -> None:
        """Remove the lease of a dead holder. Raises: UsageError: the holder lives."""
        seen = _look(self.path)
        if seen is None:
            return
        reason = self._death(seen)
        if reason is None:
            return
        # Without this guard a second process would remove the lease that the first has just taken.
        guard = self.path.with_name(f"{self.path.name}.takeover")
        try:
            os.close(os.open(guard, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            _remove_if_left(guard)
            return
        try:
            now = _look(self.path)
            if now == seen:
                self.path.unlink()
                holder = LeaseHolder.parse(seen.text) or "an unknown process"
                log.warning(f"{self.what}: {holder} left its lease behind and {reason}; it is taken over")
        finally:
            guard.unlink(missing_ok=True)

    def _death(self, seen: _Seen) -> str | None:
        """The evidence that the holder is dead; None: look again. Raises: UsageError: it lives."""
        holder = LeaseHolder.parse(seen.text)
        if holder is not None and holder.processes == self.me.processes and holder.host == self.me.host:
            if started(holder.pid) != holder.started:
                return "has ended"
            self._alive(holder)
            return None
        said, end = False, time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(_LOOK)
            now = _look(self.path)
            if now is None:
                return None
            if now != seen:
                # The text has changed: it was half-written before, or there is a new holder.
                if now.text == seen.text:
                    self._alive(holder)
                return None
            if not said and not self.wait:
                said = True
                log.info(f"{self.what} is leased by {holder}: waiting {PATIENCE:.0f} s for a sign of life")
        return f"has given no sign of life for {PATIENCE:.0f} s"

    def _alive(self, holder: LeaseHolder | None) -> None:
        """Handle a living holder. Raises: UsageError: `wait` is not given."""
        if not self.wait:
            raise UsageError(
                f"{self.what} is being written by {holder or 'another process'}; wait for it, end it, or {self.remedy}"
            )
        time.sleep(_LOOK)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            try:
                holder = self._holder()
                if holder is None:
                    self._create()
                elif holder.token == self.me.token:
                    os.utime(self.path)
                else:
                    return  # `check` reports it
            except OSError as error:  # a file system that is unavailable for a moment is no reason to stop
                log.warning(f"{self.path}: no sign of life could be written: {error.strerror}")


def _look(path: Path) -> _Seen | None:
    """The lease file, or None. It is opened anew each time: network file systems show changes after opening only."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return _Seen(file.read(4096), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


def _remove_if_left(guard: Path) -> None:
    """Remove an old guard file. A guard exists for a moment only; one that remains belongs to a killed process."""
    before = _look(guard)
    for _ in range(10):
        time.sleep(_LOOK)
        if _look(guard) != before:
            return
    guard.unlink(missing_ok=True)
