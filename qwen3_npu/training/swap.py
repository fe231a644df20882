"""--swap-optimizer: float32 masters and moments live on the host; a step brings them to the device slice by slice.

While one slice is updated, the one before leaves and the next one arrives, on streams of their own: two slices are on
the device at a time. What is computed is what the fused AdamW computes on tensors that stay on the device: the same
operation on parts of the same numbers.
"""

from __future__ import annotations

import contextlib
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
class _Piece:
    """Elements `start` to `end` of one weight's share.

    Attributes:
        main: on the host, or where the model itself is float32, the weight.
        state: the moments, on the host.
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

    def on_host(self) -> list[torch.Tensor]:
        """What comes and goes, [elements] each."""
        tensors = [*([self.main] if self.is_split else []), *(self.state[key] for key in MOMENTS)]
        return [tensor.view(-1)[self.start : self.end] for tensor in tensors]


class SwappedState:
    """The state of one distributed optimizer on the host, and its step."""

    def __init__(self, part: DistributedOptimizer, slices: int) -> None:
        """
        Args:
            part: has no moments yet; its masters go to the host.
            slices: of a step, as --swap-optimizer-times; two of them are on the device at the same time.
        """
        self.part, self.optimizer = part, part.optimizer
        self.gradients: dict[torch.Tensor, torch.Tensor] = {}
        mains = itertools.chain(*part.shard_fp32_from_float16_groups, *part.shard_fp32_groups)
        models = itertools.chain(*part.model_float16_groups, *part.model_fp32_groups)
        self.model = dict(zip(mains, models, strict=True))
        masters = {id(main) for group in part.shard_fp32_from_float16_groups for main in group}
        self.device = next((main.device for main in self.model), torch.device("cpu"))
        for main, state in self.optimizer.state.items():
            if id(main) in masters:
                main.data = self._on_host(main.data)
            for key in MOMENTS:
                state[key] = torch.zeros(main.shape, pin_memory=self.device.type != "cpu")
        self.slices = list(self._cut(slices))
        has_streams = self.device.type != "cpu"
        self.streams = [torch.cuda.Stream() for _ in range(2)] if has_streams else []
        replaced = vars(part)
        replaced["_copy_model_grads_to_main_grads"] = self._take_gradients
        replaced["get_main_grads_for_grad_norm"] = self._for_norm
        replaced["_copy_main_params_to_model_params"] = lambda: None  # `step` does
        replaced["swapped"] = self
        vars(self.optimizer)["step"] = self.step

    def _on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cpu":
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)

    def _cut(self, slices: int) -> Iterator[list[_Piece]]:
        """The weights in as many slices of about the same size, in the order of the optimizer's groups."""
        total = sum(main.numel() for main in self.model)
        size = max(-(-total // max(slices, 1) // _ROUND) * _ROUND, _ROUND)
        pieces: list[_Piece] = []
        room = size
        for group in self.optimizer.param_groups:
            for main in group["params"]:
                start, weight = 0, self._weight(self.model[main])
                while start < main.numel():
                    end = min(start + max(room // _ROUND, 1) * _ROUND, main.numel())
                    pieces.append(_Piece(main, self.optimizer.state[main], weight, group, start=start, end=end))
                    room, start = room - (end - start), end
                    if room <= 0:
                        yield pieces
                        pieces, room = [], size
        if pieces:
            yield pieces

    def _weight(self, model: torch.nn.Parameter) -> torch.Tensor:
        place = self.part._get_model_param_range_map(model)["gbuf_world_in_bucket"]
        buffer, _, bucket = self.part.model_param_gbuf_map[model]
        return self.part.buffers[buffer].buckets[bucket].param_data.view(-1)[place.start : place.end]

    def _take_gradients(self) -> None:
        """This rank's shares of the gradients, which tensors on the host cannot carry."""
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
        count = counts[0].to(self.device)  # they are all the same
        arriving, leaving = self.streams if self.streams else (None, None)
        there: list[list[list[torch.Tensor]]] = []
        done: list[Any] = []
        for number in range(len(self.slices) + 1):
            if number < len(self.slices):  # the next slice arrives
                there.append(self._fetch(self.slices[number], arriving))
                done.append(self._event(arriving))
            if number == 0:
                continue
            self._wait(done[number - 1])
            self._update(self.slices[number - 1], there[number - 1], count)
            self._return(self.slices[number - 1], there[number - 1], leaving)
            there[number - 1] = []  # the allocator may give it to the slice after the next
        if leaving is not None:
            torch.cuda.current_stream().wait_stream(leaving)

    def _fetch(self, pieces: Sequence[_Piece], stream: Any) -> list[list[torch.Tensor]]:
        if stream is None:
            return [[tensor.clone() for tensor in piece.on_host()] for piece in pieces]
        # The slice before the last has been updated and has left: its memory is taken for this one.
        stream.wait_stream(torch.cuda.current_stream())
        stream.wait_stream(self.streams[1])
        with torch.cuda.stream(stream):
            return [[t.to(self.device, non_blocking=True) for t in piece.on_host()] for piece in pieces]

    def _return(self, pieces: Sequence[_Piece], tensors: list[list[torch.Tensor]], stream: Any) -> None:
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            for piece, on_device in zip(pieces, tensors, strict=True):
                for host, changed in zip(piece.on_host(), on_device, strict=True):
                    host.copy_(changed, non_blocking=True)

    def _update(self, pieces: Sequence[_Piece], tensors: list[list[torch.Tensor]], count: torch.Tensor) -> None:
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

    def _event(self, stream: Any) -> Any:
        return None if stream is None else stream.record_event()

    def _wait(self, event: Any) -> None:
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def wait(self) -> None:
        """Until the state on the host is that of the last step."""
        for stream in self.streams:
            stream.synchronize()
