"""State check: weights, moments and masters must not change between two updates; a change is damage of the memory.

Each rank sums the bits of every tensor that it holds after an update, and again before the next one. One flipped bit,
of an exponent or of a mantissa, always changes the sum. The result is reduced together with the other numbers of a
step, so no additional wait or collective is needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from qwen3_npu.checkpoint.training.optimizer_state import gather_weights, main_parameters, parts
from qwen3_npu.distributed.agreement import first_problem
from qwen3_npu.model import quantized
from qwen3_npu.training.spikes.checksum import checksum, told_parameters


def kept(part: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, dict[str, torch.Tensor]]]:
    """For each parameter (share) that a part updates the tensors that are held beside it: kind -> tensor."""
    if (sliced := vars(part).get("sliced")) is not None:
        yield from sliced.kept()
        return
    pairs: Iterable[tuple[torch.nn.Parameter, torch.Tensor]]
    if isinstance(part, DistributedOptimizer):
        masters = [main for group in part.shard_fp32_from_float16_groups for main in group]
        models = itertools.chain(*part.model_float16_groups, *part.model_fp32_groups)
        pairs = zip(models, itertools.chain(masters, *part.shard_fp32_groups), strict=True)
    else:
        pairs = list(main_parameters(part))
        masters = [main for parameter, main in pairs if main is not parameter]
    own = {id(main) for main in masters}
    for parameter, main in pairs:
        master = {"float32 master": main} if id(main) in own else {}
        yield parameter, {**master, **{k: v for k, v in part.optimizer.state[main].items() if k != "step"}}


def _tensors(holder: object) -> Iterator[torch.Tensor]:
    """All tensors that restore a quantized weight; they belong to no module."""
    for value in vars(holder).values() if holder is not None else ():
        if isinstance(value, torch.Tensor):
            yield value
        elif type(value).__module__ == quantized.__name__:
            yield from _tensors(value)


class StateCheck:
    """The sums of this rank's state.

    Args:
        interval: steps between checks.
        chunks: the model chunks of this rank, not wrapped.
        device: of the sums.
    """

    def __init__(
        self, interval: int, chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, device: torch.device
    ) -> None:
        self.interval, self.optimizer, self.device = interval, optimizer, device
        self.names: list[str] = []
        self.tensors: list[torch.Tensor] = []
        parameters = told_parameters(chunks)
        told = {parameter: name for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            self._add(f"{'' if parameter.requires_grad else 'frozen '}weight {name}", parameter)
            for tensor in _tensors(quantized.held(parameter)):
                self._add(f"scales of quantized weight {name}", tensor)
        for part in parts(optimizer):
            for parameter, tensors in kept(part):
                for kind, tensor in tensors.items():
                    self._add(f"{kind} of {told[parameter]}", tensor)
        self.names.append("the optimizer's counts of steps")
        self.before: torch.Tensor | None = None  # the sums after the last update; None: not noted

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        self.names.append(name)
        self.tensors.append(tensor)

    def note(self, step: int) -> None:
        """Record the sums of the state, which must not change until the update of `step`, the next one."""
        self.before = None
        if step % self.interval == 0:
            gather_weights(self.optimizer)
            self.before = self._sums()

    def changed(self) -> torch.Tensor:
        """Number of tensors that have changed since, a float32 scalar on the device, without a wait."""
        assert self.before is not None
        return (self._sums() != self.before).sum(dtype=torch.float32)

    def problem(self) -> str | None:
        """A text about changed tensors and their rank, equal on every rank, or None. Every rank must call this."""
        text = None
        if self.before is not None and (places := (self._sums() != self.before).nonzero().flatten().tolist()):
            more = f" and {len(places) - 1} other tensors" if len(places) > 1 else ""
            text = f"{self.names[places[0]]}{more} changed between two updates"
        found = first_problem(text)
        if found is None:
            return None
        everyone: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, text)
        # A weight that ranks gather again (--overlap-param-gather) copies a change of one rank's share to all ranks.
        others = len(everyone) - everyone.count(None) - 1
        return f"on rank {found[0]}{f' and {others} others' if others else ''}, {found[1]}"

    @torch.no_grad()
    def _sums(self) -> torch.Tensor:
        """int32 [names]."""
        counts = []
        for part in parts(self.optimizer):
            if (sliced := vars(part).get("sliced")) is not None:
                sliced.wait()
            counts += [state["step"] for state in part.optimizer.state.values()]
        sums = [checksum(tensor) for tensor in self.tensors]
        device = self.device  # a rank of no-op layers alone has no tensor that says it
        sums.append(checksum(torch.stack(counts)) if counts else torch.zeros((), dtype=torch.int32, device=device))
        if all(one.device == device for one in sums):
            return torch.stack(sums)
        host = torch.stack([one for one in sums if one.device != device]).to(device)  # of --swap-optimizer
        rest = iter(host.unbind())
        return torch.stack([one if one.device == device else next(rest) for one in sums])
