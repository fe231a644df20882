"""Worlds of 1, 2 or 4 processes that stay up between tests."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")


class CaseFailed(Exception):
    """A case raised on some rank; the text is its traceback."""


def free_port() -> int:
    """A port that nobody listens on, below those that connections are given: it is still free a while later."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


class World:
    """`size` worker processes. A case that fails ends them; the next case starts new ones.

    Args:
        worker: the program that each process runs.
        environment: in which it runs, beside this process's own.
    """

    def __init__(self, size: int, worker: Path = WORKER, environment: dict[str, str] | None = None) -> None:
        self.size, self.worker, self.environment = size, worker, environment or {}
        self.processes: list[subprocess.Popen] = []
        self.log = tempfile.NamedTemporaryFile("w+", suffix=f".world{size}.log")

    def _start(self) -> None:
        port = str(free_port())
        for rank in range(self.size):
            env = (
                os.environ
                | self.environment
                | {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(self.size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "OMP_NUM_THREADS": "1",
                }
            )
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-u", str(self.worker)],
                    env=env,
                    text=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self.log,
                )
            )
        for process in self.processes:
            if process.stdout.readline() != "ready\n":
                text = Path(self.log.name).read_text()
                self.stop()
                raise CaseFailed(f"the world did not start:\n{text[-8000:]}")

    def run(self, case: str, timeout: float = 240, **arguments: Any) -> Any:
        """Run `cases.<case>` on every rank; what rank 0 returned.

        Raises:
            CaseFailed: it raised, or took longer than `timeout` seconds.
        """
        if not self.processes:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            line = json.dumps({"case": case, "arguments": arguments, "result": str(result)}) + "\n"
            timer = threading.Timer(timeout, self._abort)
            timer.start()
            try:
                for process in self.processes:
                    process.stdin.write(line)
                    process.stdin.flush()
                answers = self._answers()
            finally:
                timer.cancel()
            errors = [f"rank {rank}:\n{a['error']}" for rank, a in answers if "error" in a]
            if errors:
                time.sleep(1)  # those that are ending say where they were
                self.stop()
                raise CaseFailed("\n".join([*errors, "log:", Path(self.log.name).read_text()[-16000:]]))
            return json.loads(result.read_text())

    def _answers(self) -> list[tuple[int, dict]]:
        """One answer per rank, or those up to the first error: the others may wait for the failed one for ever."""
        answers: list[tuple[int, dict]] = []
        done = threading.Event()

        def listen(rank: int) -> None:
            with contextlib.suppress(ValueError):
                line = self.processes[rank].stdout.readline()
                answers.append((rank, json.loads(line) if line else {"error": "ended or took too long"}))
            if "error" in answers[-1][1] or len(answers) == self.size:
                done.set()

        for rank in range(self.size):
            threading.Thread(target=listen, args=(rank,), daemon=True).start()
        done.wait()
        return sorted(answers, key=lambda a: a[0])

    def _abort(self) -> None:
        """End the processes; each says in the log where it is."""
        for process in self.processes:
            process.send_signal(signal.SIGABRT)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        self.processes = []
