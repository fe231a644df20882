"""MindSpeed's own operators (`mindspeed.ops`), used as a library. Signatures as in `kernels/reference.py`.

MindSpeed is never imported as a patcher (`mindspeed.megatron_adaptor`), which needs megatron-core 0.12.1. Its operators
compile themselves against CANN at their first call. Written from their documentation (MindSpeed's docs/ops) and checked
against stand-ins that do what it says; never run with MindSpeed itself or on an NPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from mindspeed.ops.gmm import npu_gmm
from mindspeed.ops.npu_rotary_position_embedding import npu_rotary_position_embedding

from qwen3_npu.kernels.npu import group_ends

_HALF = 0  # mode: first half against second half


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """npu_rotary_position_embedding."""
    return npu_rotary_position_embedding(x.contiguous(), cos, sin, _HALF)


def grouped_matmul(counts: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """npu_gmm, which brings its own gradient; it refuses a single group."""
    ends = group_ends(counts)

    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 0 or len(ends) == 1:
            return x @ weight[0]
        return npu_gmm(x, weight, group_list=ends, group_type=0)

    return product
