"""Tell all ranks about a problem of one rank, at a cost that does not grow with the number of ranks.

`all_gather_object` sends an object of each rank to every rank: at 4,096 ranks hundreds of kilobytes for "no problem".
Here one number is reduced, and a text is sent only if there is a problem.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def first_problem(problem: str | None) -> tuple[int, str] | None:
    """The first rank with a problem, and its text, equal on every rank; None if no rank has one.

    Every rank must call this.
    """
    ranks = dist.get_world_size()
    (first,) = smallest([ranks if problem is None else dist.get_rank()])
    if first == ranks:
        return None
    said = [problem]
    dist.broadcast_object_list(said, first)
    return first, str(said[0])


def smallest(numbers: Sequence[int]) -> list[int]:
    """The minimum over all ranks of each number. Every rank must call this with the same count of numbers."""
    held = torch.tensor(numbers, dtype=torch.int64, device=dist.distributed_c10d._get_object_coll_device())
    dist.all_reduce(held, op=dist.ReduceOp.MIN)
    return [int(number) for number in held.tolist()]
