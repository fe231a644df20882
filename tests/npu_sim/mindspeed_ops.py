"""Stand-ins for two operators of `mindspeed.ops`, which compile themselves against CANN: what their documentation
(docs/ops/gmm.md, docs/ops/npu_rotary_position_embedding.md of MindSpeed) says that they compute and refuse.
"""

from __future__ import annotations

import sys
import types

import torch


def npu_gmm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    group_list: torch.Tensor | None = None,
    group_type: int = 0,
) -> torch.Tensor:
    """Rows of x [m, k] up to each end in group_list times the group's matrix of weight [g, k, n]."""
    if bias is not None or group_type != 0 or x.dim() != 2 or weight.dim() != 3:
        raise RuntimeError("npu_gmm: trains with groups of rows, x of 2 and weight of 3 dimensions, and no bias")
    if group_list is None or group_list.dtype != torch.int64 or group_list.device != x.device:
        raise RuntimeError("npu_gmm: group_list is int64 on the device of x")
    ends = group_list.tolist()
    if len(ends) == 1 or len(ends) != len(weight) or ends != sorted(ends) or ends[-1] != len(x):
        raise RuntimeError(f"npu_gmm: group_list {ends} of {len(weight)} groups and {len(x)} rows")
    parts = [x.cpu()[start:end] @ matrix for start, end, matrix in zip([0, *ends], ends, weight.cpu(), strict=False)]
    return torch.cat(parts).to(x.device)


def npu_rotary_position_embedding(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: int = 0) -> torch.Tensor:
    """mode 0: first half against second half; 1: even places against odd ones."""
    if any(t.dim() != 4 or t.dtype != x.dtype or t.device != x.device for t in (x, cos, sin)):
        raise RuntimeError("npu_rotary_position_embedding: x, cos and sin have 4 dimensions and one dtype")
    on_host, rotated = x.cpu(), torch.empty(0)
    if mode == 0:
        first, second = on_host.chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1)
    else:
        rotated = torch.stack((-on_host[..., 1::2], on_host[..., ::2]), dim=-1).flatten(-2)
    return (on_host * cos.cpu() + rotated * sin.cpu()).to(x.device)


def install() -> None:
    """Make `import mindspeed.ops...` find these."""
    for name, content in (
        ("mindspeed", {}),
        ("mindspeed.ops", {}),
        ("mindspeed.ops.gmm", {"npu_gmm": npu_gmm}),
        (
            "mindspeed.ops.npu_rotary_position_embedding",
            {"npu_rotary_position_embedding": npu_rotary_position_embedding},
        ),
    ):
        sys.modules[name] = module = types.ModuleType(name)
        vars(module).update(content)
