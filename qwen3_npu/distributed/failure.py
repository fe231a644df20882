"""Let torchrun know why a rank failed: it shows the first failing rank's error last, after all the others' noise."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from qwen3_npu.errors import Stopped, UsageError


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Write an exception to the file that torchrun reads, and raise it again. Users' errors go without a traceback."""
    handler = get_error_handler()
    handler.initialize()
    try:
        yield
    except (UsageError, Stopped) as error:
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            # torchrun shows py_callstack.
            extra = {"py_callstack": str(error), "timestamp": str(int(time.time()))}
            Path(file).write_text(json.dumps({"message": {"message": str(error), "extraInfo": extra}}))
        raise
    except Exception as error:
        handler.record_exception(error)
        raise
