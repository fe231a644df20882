"""A distributed optimizer whose step runs slice by slice, because its state is not stored in AdamW's form.

The result is that of the fused AdamW on complete tensors: the same operation on parts of the same numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

MOMENTS = ("exp_avg", "exp_avg_sq")
_ROUND = 1024  # elements: a slice's ends fall where a vector unit's do, so that a CPU rounds as without slices


@dataclasses.dataclass(frozen=True)
class StatePiece:
    """Elements `start` to `end` of one weight's share.

    Attributes:
        main: the float32 master; the weight itself in a float32 model.
        state: the moments.
        weight: this rank's share of the model's weight.
    """

    main: torch.Tensor
    state: dict[str, torch.Tensor]
    weight: torch.Tensor
    group: dict[str, Any]
    start: int
    end: int

    @property
    def is_split(self) -> bool:
        """Whether there is a master beside the weight."""
        return self.main.device != self.weight.device or self.main.dtype != self.weight.dtype

    def of(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """This piece's elements of tensors that have the share's shape."""
        return [tensor.view(-1)[self.start : self.end] for tensor in tensors]


class SlicedState:
    """The state of one distributed optimizer, and its step. Subclasses define where the state is between steps.

    Attributes:
        model: master -> the model's parameter.
        gradients: master -> this rank's share of its gradient, of this step.
        slices: the slices of a step.
    """

    def __init__(self, part: DistributedOptimizer, slices: int) -> None:
        """
        Args:
            part: an optimizer without moments.
            slices: number of slices.
        """
        self.part, self.optimizer = part, part.optimizer
        self.gradients: dict[torch.Tensor, torch.Tensor] = {}
        mains = itertools.chain(*part.shard_fp32_from_float16_groups, *part.shard_fp32_groups)
        models = itertools.chain(*part.model_float16_groups, *part.model_fp32_groups)
        self.model = dict(zip(mains, models, strict=True))
        self.masters = [main for group in part.shard_fp32_from_float16_groups for main in group]
        self.device = next((main.device for main in self.model), torch.device("cpu"))
        self.prepare()
        self.slices = list(self._divided(slices))
        replaced = vars(part)
        replaced["_copy_model_grads_to_main_grads"] = self._take_gradients
        replaced["get_main_grads_for_grad_norm"] = self._for_norm
        replaced["_copy_main_params_to_model_params"] = lambda: None  # `step` copies them
        replaced["sliced"] = self
        vars(self.optimizer)["step"] = self.step

    def prepare(self) -> None:
        """Create the moments, and move masters and moments to their storage."""
        raise NotImplementedError

    def run(self, count: torch.Tensor) -> None:
        """Update the slices. Args: count: of the step, a float32 scalar on the device."""
        raise NotImplementedError

    def wait(self) -> None:
        """Wait until the state is that of the last step, for a reader on the host."""

    def kept(self) -> Iterator[tuple[torch.nn.Parameter, dict[str, torch.Tensor]]]:
        """For each parameter the tensors that this rank keeps between steps beside the weight: kind -> tensor."""
        masters = {id(main) for main in self.masters}
        for main, model in self.model.items():
            master = {"float32 master": main} if id(main) in masters else {}
            yield model, {**master, **{key: self.optimizer.state[main][key] for key in MOMENTS}}

    def _divided(self, slices: int) -> Iterator[list[StatePiece]]:
        """Divide the weights into slices of about the same size, in the order of the optimizer's groups."""
        total = sum(main.numel() for main in self.model)
        size = max(-(-total // max(slices, 1) // _ROUND) * _ROUND, _ROUND)
        pieces: list[StatePiece] = []
        room = size
        for group in self.optimizer.param_groups:
            for main in group["params"]:
                start, weight = 0, self.weight(self.model[main])
                while start < main.numel():
                    end = min(start + max(room // _ROUND, 1) * _ROUND, main.numel())
                    pieces.append(StatePiece(main, self.optimizer.state[main], weight, group, start=start, end=end))
                    room, start = room - (end - start), end
                    if room <= 0:
                        yield pieces
                        pieces, room = [], size
        if pieces:
            yield pieces

    def weight(self, model: torch.nn.Parameter) -> torch.Tensor:
        """This rank's share of a weight, in the buffer from which all ranks gather it."""
        place = self.part._get_model_param_range_map(model)["gbuf_world_in_bucket"]
        buffer, _, bucket = self.part.model_param_gbuf_map[model]
        return self.part.buffers[buffer].buckets[bucket].param_data.view(-1)[place.start : place.end]

    def _take_gradients(self) -> None:
        """Take this rank's shares of the gradients, since masters that are not on the device cannot hold them."""
        for main, model in self.model.items():
            place = self.part._get_model_param_range_map(model)["param"]
            self.gradients[main] = model.main_grad.view(-1)[place.start : place.end]

    def _for_norm(self) -> list[torch.Tensor]:
        """As megatron's method of this name."""
        group = self.part.tp_group if hasattr(self.part, "tp_group") else None
        return [
            gradient
            for main, gradient in self.gradients.items()
            if param_is_not_shared(main) and param_is_not_tensor_parallel_duplicate(main, group)
        ]

    @torch.no_grad()
    def step(self) -> None:
        """One update of all weights."""
        if not self.slices:
            return
        counts = [state["step"] for state in self.optimizer.state.values()]
        torch._foreach_add_(counts, 1)
        self.run(counts[0].to(self.device))  # all step counters are equal

    def update(self, pieces: Sequence[StatePiece], tensors: list[list[torch.Tensor]], count: torch.Tensor) -> None:
        """Args: tensors: of each piece the master, if there is one, and the moments, on the device."""
        for _, of_group in itertools.groupby(zip(pieces, tensors, strict=True), key=lambda pair: id(pair[0].group)):
            pairs = list(of_group)
            weights = [piece.weight[piece.start : piece.end] for piece, _ in pairs]
            masters = [t[0] if piece.is_split else w for (piece, t), w in zip(pairs, weights, strict=True)]
            gradients = [self.gradients[piece.main][piece.start : piece.end] for piece, _ in pairs]
            first, second = ([t[i] for _, t in pairs] for i in (-2, -1))
            options = pairs[0][0].group
            beta1, beta2 = options["betas"]
            torch._fused_adamw_(
                masters, gradients, first, second, [], [count] * len(pairs),
                lr=options["lr"], beta1=beta1, beta2=beta2, weight_decay=options["weight_decay"], eps=options["eps"],
                amsgrad=False, maximize=False, grad_scale=vars(self.optimizer).get("grad_scale"), found_inf=None,
            )  # fmt: skip
            split = [(w, m) for (piece, _), w, m in zip(pairs, weights, masters, strict=True) if piece.is_split]
            if split:
                torch._foreach_copy_([weight for weight, _ in split], [master for _, master in split])
