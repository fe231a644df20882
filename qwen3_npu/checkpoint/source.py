"""What every conversion reads from: something that answers for regions of Hugging Face tensors."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from qwen3_npu.checkpoint.cuts import Piece, Region
from qwen3_npu.checkpoint.tensors import DType, convert, slices
from qwen3_npu.checkpoint.weights import Shard
from qwen3_npu.model.arch import Qwen3Arch


class Source(Protocol):
    """Weights under their Hugging Face names, wherever they lie (`HfReader`, `MegatronReader`)."""

    arch: Qwen3Arch

    def dtype(self, name: str) -> DType: ...

    def read(self, name: str, region: Region) -> np.ndarray: ...

    def close(self) -> None: ...


def read_piece(source: Source, piece: Piece) -> np.ndarray:
    """One piece's data in the orientation of its Megatron tensor (without leading dimensions of size 1)."""
    data = source.read(piece.hf, piece.source)
    return data.T if piece.transposed else data


def read_shard(source: Source, shard: Shard, dtype: DType) -> np.ndarray:
    """One Megatron tensor, put together from its pieces and converted to `dtype`. Shape: `shard.shape`."""
    out = np.empty(shard.view, dtype.carrier)
    for piece in shard.pieces:
        data = convert(read_piece(source, piece), source.dtype(piece.hf), dtype)
        out[slices(piece.target)] = data
    return out.reshape(shard.shape)
