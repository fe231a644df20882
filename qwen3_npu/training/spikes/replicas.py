"""Compare digests of replicated weights, to name the rank with silent corruption.

The bits of each tensor are summed on the device (`checksum`) and compared by one small gather in each group of ranks
that hold the same tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer import MegatronOptimizer

from qwen3_npu.checkpoint.training.optimizer_state import gather_weights, states_by_parameter
from qwen3_npu.distributed.agreement import first_problem
from qwen3_npu.training.spikes.checksum import checksum, told_parameters


class ReplicaCheck:
    """The tensors of this rank, by the group of ranks that hold the same ones."""

    def __init__(self, chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer) -> None:
        """
        Args:
            chunks: the model chunks of this rank, not wrapped.
        """
        self.optimizer = optimizer
        self.groups: list[tuple[dist.ProcessGroup, list[str], list[torch.nn.Parameter]]] = []
        dense: dict[str, torch.nn.Parameter] = {}
        experts: dict[str, torch.nn.Parameter] = {}
        for name, parameter in told_parameters(chunks).items():
            place = experts if not getattr(parameter, "allreduce", True) else dense
            place[name] = parameter
        whole = {n: p for n, p in dense.items() if not getattr(p, "tensor_model_parallel", False)}
        for group, parameters in (
            (parallel_state.get_data_parallel_group(with_context_parallel=True), dense),
            (parallel_state.get_expert_data_parallel_group(), experts),
            (parallel_state.get_tensor_model_parallel_group(), whole),
        ):
            if group.size() > 1 and parameters:
                self.groups.append((group, list(parameters), list(parameters.values())))

    def compare(self) -> str | None:
        """A text about the rank that differs, or None; equal on every rank. Every rank must call this; it waits."""
        gather_weights(self.optimizer)
        found = [text for group in self.groups if (text := self._differs(*group))]
        worst = first_problem("; ".join(sorted(set(found))) or None)
        return worst[1] if worst is not None else None

    def _differs(
        self, group: dist.ProcessGroup, names: Sequence[str], parameters: Sequence[torch.nn.Parameter]
    ) -> str | None:
        states = states_by_parameter(self.optimizer)  # a state that is not sharded has replicas, too
        labels, digests = list(names), [checksum(parameter) for parameter in parameters]
        for name, parameter in zip(names, parameters, strict=True):
            for key, tensor in states.get(parameter, {}).items():
                if tensor.data_ptr() != parameter.data_ptr():  # float32 weights are updated themselves
                    labels.append(f"{key} of {name}")
                    digests.append(checksum(tensor))
        own = torch.stack(digests)
        least, most = own.clone(), own.clone()
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        if torch.equal(least, most):
            return None
        gathered = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(gathered, own, group=group)
        rows = torch.stack(gathered).cpu()
        ranks = dist.get_process_group_ranks(group)
        return verdict(ranks, labels, [tuple(row) for row in rows.tolist()])


def verdict(ranks: Sequence[int], names: Sequence[str], rows: Sequence[tuple[int, ...]]) -> str:
    """One line about replicas that are not equal.

    Args:
        rows: for each rank the digests of the tensors `names`.
    """
    first = next(i for i in range(len(names)) if len({row[i] for row in rows}) > 1)
    count = sum(len({row[i] for row in rows}) > 1 for i in range(len(names)))
    what = names[first] + (f" and {count - 1} other tensors" if count > 1 else "")
    votes = Counter(rows)
    common, most = votes.most_common(1)[0]
    odd = [rank for rank, row in zip(ranks, rows, strict=True) if row != common]
    others = f"the same on ranks {', '.join(map(str, ranks[:16]))}"
    if 2 * most <= len(ranks):
        return f"{what} differ between {others}: no majority says which is right"
    return f"rank {', '.join(map(str, odd))} differs in {what} from {others}"
