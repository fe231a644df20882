"""Write a checkpoint, in this thread or in the background. The thread calls no collective, except to exchange files
between nodes with their own disks (--save-per-node), in a group that nothing else uses.

Every writing rank writes its files to the staging folder and records there that they are finished
(`folders.write_part`). Rank 0 waits for all of them, adds the common files, and makes the checkpoint visible. No
communication is needed while the training runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from qwen3_npu import log
from qwen3_npu.checkpoint.folders import part
from qwen3_npu.distributed.agreement import first_problem
from qwen3_npu.errors import SaveFailed
from qwen3_npu.processes import beside

_POLL = 0.02  # seconds
_PATIENCE = 20.0  # seconds to wait for the other ranks' files when this process is about to end


class Writing:
    """One checkpoint that is being written.

    Args:
        what: name of the checkpoint, for messages.
        steps: functions that make this rank's files, in order. A step may need files that other ranks made in the
            step before (`wait_for`).
        publish: on rank 0 (or one rank of each node), makes the checkpoint visible once every rank has written.
        stage, writers: the staging folder, and the ranks that write.
        exchange: the step in which nodes exchange files. In a thread it also runs after an error, since others wait.
        background: a thread makes the files; else `wait` does, and all ranks begin a step together.
    """

    def __init__(
        self,
        what: str,
        steps: Sequence[Callable[[Writing], None]],
        publish: Callable[[], None] | None,
        stage: Path,
        *,
        writers: Sequence[int],
        background: bool,
        exchange: int | None = None,
    ) -> None:
        self.exchange = exchange
        self.what, self.steps, self.publish, self.stage, self.writers = what, steps, publish, stage, writers
        self.error: str | None = None
        self.abandoned = threading.Event()
        self.done = [threading.Event() for _ in steps]
        self.thread: threading.Thread | None = None
        if background:
            # Not a daemon: a process that ends finishes its files first.
            self.thread = threading.Thread(target=self._run, name="checkpoint")
            self.thread.start()

    def _run(self) -> None:
        with beside():
            for number in range(len(self.steps)):
                self._make(number)
            self._publish()

    def _make(self, number: int) -> None:
        try:
            if not self.error or number == self.exchange:
                self.steps[number](self)
        except Exception as error:
            if not self.error:
                self._fail(error)
        self.done[number].set()

    def _publish(self) -> None:
        try:
            if self.publish is not None and not self.error and self.wait_for([part(rank) for rank in self.writers]):
                self.publish()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.error = f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)
        log.warning(f"{self.what} was not saved: {self.error}")

    def wait_for(self, names: Sequence[str]) -> bool:
        """Wait for files of other ranks in the staging folder. False if the checkpoint was abandoned meanwhile."""
        missing, alone_since = list(names), None
        while missing and not self.abandoned.is_set():
            missing = [name for name in missing if not (self.stage / name).is_file()]
            if not threading.main_thread().is_alive():
                alone_since = alone_since or time.monotonic()
                if time.monotonic() - alone_since > _PATIENCE:
                    raise RuntimeError(f"other ranks did not finish {', '.join(missing)}")
            if missing:
                time.sleep(_POLL)
        return not missing

    def wait(self) -> None:
        """Wait until the checkpoint is visible. Every rank must call this.

        Raises:
            SaveFailed: on every rank, if some rank could not write.
        """
        for number, done in enumerate(self.done):
            if self.thread is None and not self.abandoned.is_set():
                self._make(number)
            elif self.thread is not None:
                done.wait()
            if first_problem(self.error) is not None:
                self.abandoned.set()
        if self.thread is not None:
            self.thread.join()
        else:
            self._publish()
        failed = first_problem(self.error)
        if failed is not None:
            raise SaveFailed(f"{self.what} was not saved: rank {failed[0]}: {failed[1]}")
