"""A checkpoint being written, in this thread or beside the training. The thread makes no collective call, but for the
exchange of files between nodes with disks of their own, in a group that nothing else uses.

Every writing rank writes its files in the stage and says there that they are finished (`manifest.write_part`). Rank 0
waits for all of them, adds the common files, and makes the checkpoint visible. The ranks need no communication while
the training runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from qwen3_npu import log
from qwen3_npu.checkpoint.manifest import part
from qwen3_npu.distributed.agreement import first_problem
from qwen3_npu.errors import SaveFailed
from qwen3_npu.processes import beside

_POLL = 0.02  # seconds
_PATIENCE = 20.0  # seconds to wait for the other ranks' files when this process is about to end


class Writing:
    """One checkpoint that is being written.

    Args:
        what: names it.
        steps: makes this rank's files, one after the other. A step may need what other ranks made in the step before
            (`wait_for`).
        publish: on rank 0 (or one of each node), makes the checkpoint visible once every rank has written.
        stage, writers: where it is made, and the ranks that write.
        exchange: the step in which nodes exchange files; in a thread it is made after an error, too: others wait there.
        background: in a thread; else `wait` makes the files, too, and all ranks begin a step together.
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
        """Wait for files of other ranks in the stage; False: the checkpoint was abandoned meanwhile."""
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
        """Until the checkpoint is visible. Every rank must call this.

        Raises:
            SaveFailed: some rank could not write; on every rank.
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
