"""What torch_npu's own sanitizer of streams says of a training on simulated NPUs.

It knows which stream has waited for which, and complains of tensors that one stream writes while another, which nothing
made wait, uses them; and of memory that is given back while another stream may still use it.
"""

from __future__ import annotations

import collections
import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch_npu
from torch.cuda._sanitizer import SynchronizationError
from torch_npu.npu import _stream_check as stream_check
from torch_npu.npu._sanitizer import NPUSanitizer
from torch_npu.utils import _npu_trace as npu_trace

from qwen3_npu.distributed.launch import World
from qwen3_npu.parity.measure import trainer
from qwen3_npu.platform.base import Platform


class _Noting(stream_check.NPUSanitizerDispatchMode):
    """Goes on after an error."""

    def __init__(self, handler: stream_check.NPURecordStreamHandler) -> None:
        super().__init__(handler)
        self.errors: list[SynchronizationError] = []

    def check_errors(self, func: Any, npu_stream: int) -> None:
        handled = self.args_handler
        self.errors += self.event_handler._handle_kernel_launch(
            npu_stream,
            handled.dataptrs_read - handled.dataptrs_written,
            handled.dataptrs_written,
            handled.outputs,
            str(func._schema),
            handled.tensor_aliases,
            storage_dataptrs_accessed=handled.storage_dataptrs_accessed,
        )


@contextlib.contextmanager
def sanitized() -> Iterator[_Noting]:
    """The sanitizer watches this process."""
    torch_npu._C._activate_npu_trace(0)
    sanitizer = NPUSanitizer()
    sanitizer.enable_stream_check()
    sanitizer.dispatch.__exit__(None, None, None)
    sanitizer.dispatch = None
    with _Noting(sanitizer.event_handler) as noting:
        try:
            yield noting
        finally:
            for registry in vars(npu_trace).values():
                if isinstance(registry, npu_trace.CallbackRegistry):
                    registry.callback_list.clear()
            noting.errors += noting.event_handler.record_stream_errors


def complaints(platform: Platform, world: World, flags: list[str], steps: int) -> dict[str, int]:
    """Complaint -> how often, in some steps of a training."""
    with sanitized() as noting, trainer(platform, world, flags) as made:
        for _ in range(steps):
            made.step()
    return dict(collections.Counter(map(_told, noting.errors)))


def _told(error: SynchronizationError) -> str:
    """Kind, operations, and who called them in the package."""
    text = str(error).partition("Tensor was allocated")[0]
    operations = re.findall(r"aten::\w+|npu::\w+", text)
    callers = re.findall(r"qwen3_npu/(\S+)\.py\", line \d+, in (\w+)", text)
    return (
        f"{type(error).__name__} of {', '.join(dict.fromkeys(operations))} in {callers[-1:] and '.'.join(callers[-1])}"
    )
