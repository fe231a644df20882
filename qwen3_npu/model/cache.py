"""The cache of keys and values between forward passes, and the attention to them.

A pass takes the new tokens of several sequences, packed in one row [s, 1, ...], so unequal lengths need no padding.
The objects here are `TokenSequence`s: every layer gets them as `packed_seq_params` and calls their attention.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch

from qwen3_npu.distributed.ring import merge_block
from qwen3_npu.kernels import Kernels
from qwen3_npu.model.sequence import TokenSequence


class KVCache:
    """Preallocated keys and values.

    Attributes:
        data: [layers, 2, slots, g, capacity, d]; a slot holds one sequence.
    """

    def __init__(
        self,
        layer_numbers: Iterable[int],
        *,
        slots: int,
        capacity: int,
        groups: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args: layer_numbers: of this rank's layers. groups: its key/value heads. capacity: tokens of a slot."""
        self.index = {number: i for i, number in enumerate(layer_numbers)}
        shape = (len(self.index), 2, slots, groups, capacity, head_dim)
        # Zeros: a masked key has weight 0, which times NaN would be NaN.
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.slots, self.capacity = slots, capacity

    def layer(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, [slots, g, capacity, d] each."""
        keys, values = self.data[self.index[number]].unbind()
        return keys, values

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first tokens of one slot to another."""
        if source != target and length:
            self.data[:, :, target, :, :length] = self.data[:, :, source, :, :length]

    def reorder(self, sources: list[int], first: int, length: int) -> None:
        """Copy slot sources[i] to slot first + i, for all i at once (beam search)."""
        moved = [i for i, source in enumerate(sources) if source != first + i]
        if moved:
            kept = self.data[:, :, [sources[i] for i in moved], :, :length]
            self.data[:, :, [first + i for i in moved], :, :length] = kept

    @property
    def bytes(self) -> int:
        return self.data.numel() * self.data.element_size()


class Kept(NamedTuple):
    """New tokens of one sequence: `length` tokens after the `start` tokens in its slot."""

    slot: int
    start: int
    length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedSequence(TokenSequence):
    """New tokens of several sequences. Each attends to the cached tokens of its sequence and is cached itself.

    Attributes:
        cache: keys and values.
        kept: the sequences, in the order of the packed tokens.
    """

    cache: KVCache
    kept: tuple[Kept, ...]

    @functools.cached_property
    def is_decode(self) -> bool:
        """Whether there is one new token for each of the first slots, in order."""
        return all(k.length == 1 and k.slot == i for i, k in enumerate(self.kept))

    @functools.cached_property
    def lengths(self) -> torch.Tensor:
        """[sequences] int64: number of cached tokens of each sequence, which is the position of its one new token."""
        assert self.is_decode
        return self.positions[0]

    @functools.cached_property
    def ends(self) -> list[int]:
        """Number of tokens of each sequence, including the new ones."""
        return [k.start + k.length for k in self.kept]

    @functools.cached_property
    def visible(self) -> torch.Tensor | None:
        """[sequences, longest] bool: which keys each sequence has; None if they are equally long."""
        if len({k.start for k in self.kept}) == 1:
            return None
        return torch.arange(max(self.ends), device=self.positions.device) <= self.lengths.unsqueeze(1)

    @functools.cached_property
    def slots(self) -> torch.Tensor:
        return torch.arange(len(self.kept), device=self.positions.device)

    def attend(
        self, number: int, kernels: Kernels, q: torch.Tensor, k: torch.Tensor, *, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention of layer `number`; q [s, 1, n, d], k and v [s, 1, g, d]; [s, 1, n, d]."""
        keys, values = self.cache.layer(number)
        if self.is_decode:
            if len(self.kept) == 1:
                keys[0, :, self.kept[0].start] = k[0, 0]
                values[0, :, self.kept[0].start] = v[0, 0]
            else:
                keys[self.slots, :, self.lengths] = k[:, 0]
                values[self.slots, :, self.lengths] = v[:, 0]
            rows = len(self.kept)
            return kernels.decode_attention(
                q[:, 0], keys[:rows], values[:rows], self.visible, lengths=self.ends, scale=scale
            ).unsqueeze(1)
        out, first = [], 0
        for slot, start, length in self.kept:
            new, stored, end = slice(first, first + length), slice(start, start + length), start + length
            keys[slot, :, stored] = k[new, 0].transpose(0, 1)
            values[slot, :, stored] = v[new, 0].transpose(0, 1)
            seen = (x[slot, :, :end].transpose(0, 1).unsqueeze(1) for x in (keys, values))
            out.append(kernels.attention(q[new], *seen, scale=scale))
            first += length
        return torch.cat(out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixedSequence(TokenSequence):
    """Packed documents that follow the same prefix. They are not cached.

    The attention of all tokens to the prefix is one block. It is merged with the attention inside each document.

    Attributes:
        cache: its slot 0 holds the prefix.
        prefix: tokens of the prefix.
    """

    cache: KVCache
    prefix: int

    def attend(
        self, number: int, kernels: Kernels, q: torch.Tensor, k: torch.Tensor, *, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """As `CachedSequence.attend`."""
        keys, values = (x[0, :, : self.prefix].transpose(0, 1).unsqueeze(1) for x in self.cache.layer(number))
        own, own_lse = kernels.attention_block(q, k, v, scale=scale, cu_seqlens=self.cu_seqlens)
        out, lse = own.float(), own_lse.float().clone()
        merge_block(out, lse, *kernels.attention_block(q, keys, values, scale=scale, cu_seqlens=None))
        return out.to(q.dtype)
