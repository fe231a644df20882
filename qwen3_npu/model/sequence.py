"""Position and document of each token of a micro-batch, as one object for all layers.

The object travels as megatron-core's `packed_seq_params` argument, which reaches every layer on every pipeline stage
and virtual chunk. Each stage makes it from the batch itself, so every stage has the document boundaries.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from qwen3_npu.model.arch.rope import Rope


@dataclasses.dataclass(frozen=True)
class TokenSequence:
    """Positions and documents of the tokens of one micro-batch.

    Attributes:
        positions: [b, s] int64, for rotary embedding.
        cu_seqlens: boundaries of packed documents, (0, ..., s), as host integers; None if every row is one document.
        rope: the rotary embedding.
        dtype: of the activations.
        padding: [b, s] bool, true where a token is padding, for the routers; None: no padding.
    """

    positions: torch.Tensor
    cu_seqlens: tuple[int, ...] | None
    rope: Rope
    dtype: torch.dtype
    padding: torch.Tensor | None = None

    @functools.cached_property
    def cos_sin(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the rotation angles, [s, 1 or b, 1, d]; made once per micro-batch in float32.

        Rows with the same positions share one column.
        """
        rows = self.positions[:1] if _same_rows(self.positions) else self.positions
        angles = rows.t().unsqueeze(-1).float() * frequencies(self.rope, rows.device)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
        cos, sin, factor = angles.cos(), angles.sin(), self.rope.attention_factor
        if factor != 1:
            cos, sin = cos * factor, sin * factor
        return cos.to(self.dtype), sin.to(self.dtype)


@functools.lru_cache(maxsize=8)
def frequencies(rope: Rope, device: torch.device) -> torch.Tensor:
    """Rotation per position of each pair of dimensions, [head_dim / 2] float32, made on the host as in transformers."""
    exponent = torch.arange(0, rope.head_dim, 2, dtype=torch.float32) / rope.head_dim
    plain = 1.0 / rope.theta**exponent
    found = plain if rope.divisors is None else plain / torch.tensor(rope.divisors, dtype=torch.float32)
    return found.to(device)


def _same_rows(positions: torch.Tensor) -> bool:
    # A broadcast view (stride 0) is the usual case and needs no comparison, hence no wait for the device.
    return positions.shape[0] == 1 or positions.stride(0) == 0
