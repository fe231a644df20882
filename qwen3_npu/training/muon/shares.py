"""Distribute the matrices over data-parallel ranks, and gather those that several ranks hold in parts.

The distributed optimizer divides each bucket of weights into one slice per data-parallel rank, without regard to
matrices. A rank updates the matrices that lie in its slices. A matrix in several slices is sent to one rank, its owner,
which sends the update back: a rank sends and receives about its share of the weights twice a step, in their dtype.
Owners are chosen so that all ranks have the same work. Matrices are sent in rounds, so a rank holds one at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from qwen3_npu.training.muon.matrices import LayerMatrix


@dataclasses.dataclass(frozen=True)
class Share:
    """Elements `start` to `stop` of a tensor that this rank updates: one or several matrices, or a part of one."""

    main: torch.Tensor
    matrix: LayerMatrix
    start: int
    stop: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same elements of a tensor of its shape, flat, a view."""
        return tensor.view(-1)[self.start : self.stop]


@dataclasses.dataclass(frozen=True)
class ShardedMatrix:
    """A matrix that lies on several ranks of the data-parallel group.

    Attributes:
        lengths: number of its elements on each rank, in the order of the ranks.
        share: this rank's elements; None if it has none.
    """

    matrix: LayerMatrix
    lengths: tuple[int, ...]
    share: Share | None


Round = Mapping[int, ShardedMatrix]  # owner -> its matrix


@dataclasses.dataclass(frozen=True)
class Work:
    """The matrices of this rank.

    Attributes:
        whole: matrices that it updates alone.
        rounds: rounds of the matrices on several ranks; equal on all of them.
        group: the data-parallel ranks; None if each has all of the weights.
        device: device of all tensors.
    """

    whole: Sequence[Share]
    rounds: Sequence[Round] = ()
    group: dist.ProcessGroup | None = None
    device: torch.device | None = None


def undivided(matrices: Mapping[torch.Tensor, LayerMatrix]) -> Work:
    """The work if each data-parallel rank has and updates all tensors."""
    return Work([Share(main, matrix, 0, main.numel()) for main, matrix in matrices.items()])


def divided(
    part: DistributedOptimizer,
    matrices: Mapping[torch.nn.Parameter, LayerMatrix],
    mains: Mapping[torch.nn.Parameter, torch.Tensor],
) -> Work:
    """The work for the slices of a distributed optimizer.

    Args:
        matrices: of all parameters of the part, also those without a share on this rank.
        mains: parameter -> this rank's slice of it, flat.
    """
    group = part.data_parallel_group
    ranks, rank = group.size(), group.rank()
    whole: list[Share] = []
    sharded: list[ShardedMatrix] = []
    load = [0.0] * ranks
    for parameter, start, each in _places(part):
        if parameter not in matrices:
            continue
        matrix = matrices[parameter]
        own = rank * each - start  # where this rank's slice begins, from the parameter's first element
        for first in range(0, parameter.numel(), matrix.size):
            lengths = tuple(_overlap(start + first, matrix.size, each * other, each) for other in range(ranks))
            share = None
            if lengths[rank]:
                begin = max(first, own) - max(0, own)
                share = Share(mains[parameter], matrix, begin, begin + lengths[rank])
            if max(lengths) < matrix.size:
                sharded.append(ShardedMatrix(matrix, lengths, share))
                continue
            load[lengths.index(matrix.size)] += _cost(matrix)
            if share is not None:
                _append(whole, share)
    device = part.buffers[0].grad_data.device if part.buffers else None  # no-op layers alone have no weights
    return Work(whole, _rounds(sharded, load), group, device)


def _places(part: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Each parameter, its place in its bucket, and the length of the bucket's slices."""
    for buffer in part.buffers:
        for parameter, (begin, _, index) in buffer.param_index_map.items():
            bucket = buffer.buckets[index]
            yield parameter, begin - bucket.offset, bucket.grad_data.numel() // part.data_parallel_group.size()


def _overlap(start: int, length: int, other: int, other_length: int) -> int:
    return max(0, min(start + length, other + other_length) - max(start, other))


def _append(whole: list[Share], share: Share) -> None:
    """Append matrices; consecutive experts of one tensor are updated together."""
    last = whole[-1] if whole else None
    if last is not None and last.main is share.main and last.stop == share.start:
        share = dataclasses.replace(share, start=whole.pop().start)
    whole.append(share)


def _cost(matrix: LayerMatrix) -> float:
    """Cost of one step of the iteration, up to a factor."""
    return float(matrix.size) * min(matrix.out, matrix.inner)


def _rounds(sharded: Sequence[ShardedMatrix], load: list[float]) -> list[Round]:
    """Assign matrices, largest first, to the rank with the least work."""
    owned: list[list[ShardedMatrix]] = [[] for _ in load]
    for matrix in sorted(sharded, key=lambda one: -_cost(one.matrix)):
        owner = min(range(len(load)), key=load.__getitem__)
        load[owner] += _cost(matrix.matrix)
        owned[owner].append(matrix)
    rows = itertools.zip_longest(*owned)
    return [{owner: one for owner, one in enumerate(row) if one is not None} for row in rows]


def to_owner(pieces: Sequence[torch.Tensor], turn: Round, group: dist.ProcessGroup, like: torch.Tensor) -> torch.Tensor:
    """The matrix that this rank owns in a round, flat; empty if it owns none. Every rank of the group calls it.

    Args:
        pieces: of this rank, one for each matrix of the round.
        like: a tensor of their dtype and device.
    """
    sent, received = _lengths(turn, group)
    matrix = like.new_empty(sum(received))
    dist.all_to_all_single(matrix, torch.cat([like.new_empty(0), *pieces]), received, sent, group=group)
    return matrix


def from_owner(update: torch.Tensor, turn: Round, group: dist.ProcessGroup) -> Sequence[torch.Tensor]:
    """The reverse of `to_owner`: the update of the owned matrix -> the updates of this rank's pieces."""
    sent, received = _lengths(turn, group)
    pieces = update.new_empty(sum(sent))
    dist.all_to_all_single(pieces, update, sent, received, group=group)
    return pieces.split([sent[owner] for owner in turn])


def _lengths(turn: Round, group: dist.ProcessGroup) -> tuple[list[int], list[int]]:
    """Elements for each owner, and from each rank for this one."""
    rank, ranks = group.rank(), range(group.size())
    sent = [turn[owner].lengths[rank] if owner in turn else 0 for owner in ranks]
    received = list(turn[rank].lengths) if rank in turn else [0] * len(ranks)
    return sent, received
