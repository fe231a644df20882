"""Record operations in which an NPU multiplies and communicates at once (`kernels/npu.py`)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from qwen3_npu.trace.record import TraceRecorder


class RecordedProducts:
    """`FusedProducts` on tensors without data: each is recorded as one operation with a product and an exchange."""

    def __init__(self, recorder: TraceRecorder) -> None:
        self.recorder = recorder

    def gather_product(
        self, x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup, *, keep: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `FusedProducts`."""
        whole = x.new_empty(group.size() * x.shape[0], x.shape[1])
        with self.recorder.exchanging("npu.npu_all_gather_base_mm", group, x.nbytes + whole.nbytes):
            product = whole @ weight
        return product, whole if keep else x.new_empty(0)

    def product_scatter(self, x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """See `FusedProducts`."""
        part = x.new_empty(x.shape[0] // group.size(), weight.shape[1])
        with self.recorder.exchanging("npu.npu_mm_reduce_scatter_base", group, part.nbytes * (group.size() + 1)):
            torch.mm(x, weight)
        return part
