"""--reuse-fp32-param: the 16-bit weight is the upper half of its float32 master; only the lower half is stored.

A weight is its master rounded to nearest, to even at a tie. The difference of master and weight, in units of the
master's last bit, is a number from -32768 to 32768. Both ends are ties, and both are -32768 in 16 bits. The sign of the
second moment, which is never negative otherwise, tells them apart. So masters are restored exactly.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwen3_npu.training.update.slices import MOMENTS, SlicedState, StatePiece

_TIE = 32768


def joined_master(weight: torch.Tensor, low: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The float32 master of a bfloat16 weight, its lower half (int16) and its second moment."""
    bits = weight.contiguous().view(torch.int16).to(torch.int32) * 65536 + low
    return (bits + torch.signbit(second).to(torch.int32) * 65536).view(torch.float32)


def split(master: torch.Tensor, weight: torch.Tensor, low: torch.Tensor, second: torch.Tensor) -> None:
    """The reverse, in place.

    Args:
        weight: the master, rounded.
        low, second: outputs; of `second` only the sign is written, which must be positive before.
    """
    rest = master.view(torch.int32) - weight.contiguous().view(torch.int16).to(torch.int32) * 65536
    low.copy_(torch.where(rest == _TIE, -_TIE, rest))
    second.copy_(torch.where(rest == _TIE, -second, second))


class HalvedState(SlicedState):
    """Lower halves of the masters, and moments, on the device."""

    def prepare(self) -> None:
        """As `SlicedState.prepare`. The masters equal their weights, since no step was made yet."""
        self.low: dict[torch.Tensor, torch.Tensor] = {}
        nothing = torch.zeros(1, device=self.device)
        for main in self.masters:
            self.low[main] = torch.zeros(main.shape, dtype=torch.int16, device=self.device)
            main.data = nothing.expand(main.shape)  # a placeholder without memory
        for main, state in self.optimizer.state.items():
            for key in MOMENTS:
                state[key] = torch.zeros(main.shape, device=self.device)
        replaced = vars(self.part)
        replaced["_copy_model_params_to_main_params"] = self._reset
        replaced["_get_main_param_and_optimizer_states"] = self._state_of
        replaced["_set_main_param_and_optimizer_states"] = self._set_state_of
        self.main = {model: main for main, model in self.model.items()}

    def kept(self) -> Iterator[tuple[torch.nn.Parameter, dict[str, torch.Tensor]]]:
        """As `SlicedState.kept`."""
        for (model, tensors), main in zip(super().kept(), self.model, strict=True):
            if main in self.low:
                tensors["float32 master"] = self.low[main]  # its lower half; the upper one is the weight
            yield model, tensors

    def run(self, count: torch.Tensor) -> None:
        """As `SlicedState.run`."""
        for pieces in self.slices:
            tensors = [self._tensors(piece) for piece in pieces]
            self.update(pieces, tensors, count)
            for piece, (*master, _, second) in zip(pieces, tensors, strict=True):
                if master:
                    kept = piece.of([piece.weight, self.low[piece.main], piece.state["exp_avg_sq"]])
                    kept[2].copy_(second)
                    split(master[0], *kept)

    def _tensors(self, piece: StatePiece) -> list[torch.Tensor]:
        first, second = piece.of([piece.state[key] for key in MOMENTS])
        if not piece.is_split:
            return [first, second]
        weight, low = piece.of([piece.weight, self.low[piece.main]])
        return [joined_master(weight, low, second), first, second.abs()]

    def _reset(self, state_dict: object = None) -> None:
        """Set the masters to the present weights."""
        assert state_dict is None
        for main, low in self.low.items():
            low.zero_()
            self.optimizer.state[main]["exp_avg_sq"].abs_()

    def _state_of(self, model: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """As megatron's method of this name, {param, exp_avg, exp_avg_sq, ..}."""
        main = self.main[model]
        state = self.optimizer.state[main]
        if main not in self.low:
            return {"param": main, **state}
        second = state["exp_avg_sq"]
        master = joined_master(self.weight(model), self.low[main].view(-1), second.view(-1)).view(main.shape)
        return {**state, "param": master, "exp_avg_sq": second.abs()}

    def _set_state_of(self, model: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        """As megatron's method of this name; the weight becomes its master, rounded."""
        main = self.main[model]
        state = self.optimizer.state[main]
        for key in state:
            state[key].copy_(tensors[key])
        if main not in self.low:
            main.copy_(tensors["param"])
            return
        master, weight = tensors["param"].to(self.device).float().reshape(-1), self.weight(model)
        weight.copy_(master)
        split(master, weight, self.low[main].view(-1), state["exp_avg_sq"].view(-1))
