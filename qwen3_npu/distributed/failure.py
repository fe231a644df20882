"""Let torchrun know why a rank failed: it shows the first failing rank's error last, after the output of the other
ranks.
"""

from __future__ import annotations

import contextlib
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
        raise  # `cli.run` tells
    except Exception as error:
        handler.record_exception(error)
        raise
