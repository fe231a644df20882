"""Let torchrun know why a rank failed: it shows the first failing rank's error last, after the output of the other
ranks.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Iterator

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from qwen3_npu.errors import Stopped, UsageError


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Write an exception to the file that torchrun reads, and raise it again."""
    handler = get_error_handler()
    handler.initialize()
    try:
        yield
    except (UsageError, Stopped):
        raise  # `cli.run` prints it
    except Exception as error:
        if _raised_by_a_collective(error):
            # Most likely another rank has failed. torchrun shows the earliest error, and error times are whole seconds.
            time.sleep(1.1)
        handler.record_exception(error)
        raise


def _raised_by_a_collective(error: Exception) -> bool:
    """Whether an exception was raised in torch.distributed (or in the hang watch around it)."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].startswith(("torch.distributed", "qwen3_npu.watch.collectives"))
