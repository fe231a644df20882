"""The communicators between pipeline stages, made before the first step."""

from __future__ import annotations

import torch
import torch.distributed as dist


def introduce_stages(group: dist.ProcessGroup, device: torch.device | int, *, batched: bool) -> None:
    """Use each communicator of a pipeline once, in one order on all ranks.

    NCCL and HCCL create communicators at first use. In the middle of a schedule this can deadlock: stages wait for each
    other.

    Args:
        group: the stages.
        batched: stages exchange in the group's communicator; else each pair of neighbours has a separate one.
    """
    size, stage = group.size(), group.rank()
    if size == 1:
        return
    token = torch.zeros(1, device=device)
    dist.all_reduce(token, group=group)
    if batched:
        return
    ranks = dist.get_process_group_ranks(group)
    # Between two stages megatron sends one direction in their group, and the other in the group of all ranks.
    carriers = [group, dist.group.WORLD] if size == 2 else [group]
    pairs = [(first, (first + 1) % size) for first in range(size if size > 2 else 1)]
    for carrier in carriers:
        for pair in pairs:
            for source, target in (pair, pair[::-1]):
                if stage == source:
                    dist.send(token, ranks[target], group=carrier)
                elif stage == target:
                    dist.recv(token, ranks[source], group=carrier)
