"""What each token of a micro-batch is: its position and its document. The one channel by which layers learn it.

The object travels as megatron-core's `packed_seq_params` argument, which reaches every layer on every pipeline stage
and virtual chunk. Each stage makes it from the batch itself, so no stage can miss document boundaries.
"""

from __future__ import annotations

import dataclasses
import functools

import torch


@dataclasses.dataclass(frozen=True)
class TokenSequence:
    """Positions and documents of the tokens of one micro-batch.

    Attributes:
        positions: [b, s] int64, for rotary embedding.
        cu_seqlens: boundaries of packed documents, (0, ..., s), as host integers; None if every row is one document.
        rope_theta, head_dim: of the model.
        dtype: of the activations.
        padding: [b, s] bool, where a token is padding, for the routers of experts; None: nowhere.
    """

    positions: torch.Tensor
    cu_seqlens: tuple[int, ...] | None
    rope_theta: float
    head_dim: int
    dtype: torch.dtype
    padding: torch.Tensor | None = None

    @functools.cached_property
    def cos_sin(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the rotation angles, [s, 1 or b, 1, d]; made once per micro-batch, in float32 as transformers.

        Rows with the same positions share one column.
        """
        rows = self.positions[:1] if _same_rows(self.positions) else self.positions
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=rows.device) / self.head_dim
        angles = rows.t().unsqueeze(-1).float() * (1.0 / self.rope_theta**exponent)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


def _same_rows(positions: torch.Tensor) -> bool:
    # A broadcast view (stride 0) is the usual case and needs no comparison, hence no wait for the device.
    return positions.shape[0] == 1 or positions.stride(0) == 0
