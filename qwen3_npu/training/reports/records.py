"""metrics.jsonl and tensorboard events. A full disk does not end a training."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3_npu import log

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Records:
    """Writers of one folder. A failure is logged once, counted, and logged again at the end.

    Args:
        first: steps before this run; tensorboard drops later events of earlier runs.
    """

    def __init__(self, folder: Path, first: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self.lost: dict[str, int] = {}  # name -> records that were not written
        self.file: int | None = None
        self.tensorboard: SummaryWriter | None = None
        with self._tolerated("metrics.jsonl"):
            self.file = _open_lines(self.path)
        self._hook = threading.excepthook
        threading.excepthook = self._in_thread
        with self._tolerated("tensorboard"):
            # Imported here: it takes a second, and only rank 0 with a folder needs it.
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder), purge_step=first + 1)

    @contextlib.contextmanager
    def _tolerated(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            self._failed(name, error)

    def _failed(self, name: str, error: BaseException | None) -> None:
        if name not in self.lost:
            reason = getattr(error, "strerror", None) or str(error) or "it has failed"
            log.warning(f"{self.path.parent}: {name} cannot be written ({reason}); the training continues without")
        self.lost[name] = self.lost.get(name, 0) + 1

    def _in_thread(self, args: threading.ExceptHookArgs) -> None:
        """Tensorboard writes in a thread. Its next call raises the same error again, which is reported then."""
        of_tensorboard = type(args.thread).__module__.startswith("tensorboard.")
        if not (of_tensorboard and isinstance(args.exc_value, OSError | ValueError)):
            self._hook(args)

    def line(self, iteration: int, values: Mapping[str, object]) -> None:
        """Write one line of metrics.jsonl atomically."""
        if self.file is None:
            return
        with self._tolerated("metrics.jsonl"):
            before = os.lseek(self.file, 0, os.SEEK_END) if self.path.is_file() else None
            text = (json.dumps({"step": iteration, **values}) + "\n").encode()
            try:
                written = os.write(self.file, text)
            except OSError:
                written = 0
                raise
            finally:
                if before is not None and written < len(text):
                    os.ftruncate(self.file, before)
            if written < len(text):
                raise OSError("no space is left")

    def events(self, write: Callable[[SummaryWriter], None]) -> None:
        """Call `write` with tensorboard's writer. A writer that has failed is not used again."""
        if self.tensorboard is None:
            return
        if "tensorboard" in self.lost:
            self._failed("tensorboard", None)
            return
        with self._tolerated("tensorboard"):
            write(self.tensorboard)

    def close(self) -> None:
        """Log the number of records that were not written."""
        if self.tensorboard is not None and "tensorboard" not in self.lost:
            with self._tolerated("tensorboard"):
                self.tensorboard.close()
        threading.excepthook = self._hook
        if self.file is not None:
            with self._tolerated("metrics.jsonl"):
                os.close(self.file)
        for name, count in self.lost.items():
            log.warning(f"{self.path.parent}: {name}: {count} records were not written")


def _open_lines(path: Path) -> int:
    """Open a file to append lines; an incomplete last line of a killed process is removed."""
    if path.is_file():
        with open(path, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
