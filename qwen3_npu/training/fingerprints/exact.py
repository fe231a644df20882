"""Compute the definition of each operation again on the host, with the inputs of a kernel.

It is computed in float64, which gives the correct value for 16-bit and float32 inputs, and in the inputs' own dtypes.
The difference of both is what rounding explains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from qwen3_npu.kernels import reference


class _Double(TorchFunctionMode):
    """Keep float64 where the reference converts to float32 for precision."""

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func is torch.Tensor.float and args[0].dtype is torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, group: object, vocab_size: int) -> torch.Tensor:
    """As the kernel on one rank, in plain operations. A label out of range is treated as the largest logit."""
    logits = logits.float()[..., :vocab_size]
    elsewhere = (labels < 0) | (labels >= vocab_size)
    chosen = logits.gather(-1, labels.masked_fill(elsewhere, 0).unsqueeze(-1)).squeeze(-1)
    return logits.logsumexp(-1) - torch.where(elsewhere, logits.detach().amax(-1), chosen)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def add_weight_gradient(x: torch.Tensor, grad: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return total + grad.to(total.dtype).t() @ x.to(total.dtype)


# Those of `reference` that need another one here.
_OWN: dict[str, Callable] = {
    "cross_entropy": cross_entropy,
    "linear": linear,
    "add_weight_gradient": add_weight_gradient,
}


def definition(operation: str) -> Callable:
    """The definition of a kernel, by its name, or of "linear"."""
    return _OWN.get(operation) or getattr(reference, operation)


def host_copy(value: object) -> Any:
    """A copy of a tensor; anything else as it is."""
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def floats(values: object) -> list[torch.Tensor]:
    """The floating-point tensors of a result."""
    items = values if isinstance(values, (tuple, list)) else (values,)
    return [item for item in items if isinstance(item, torch.Tensor) and item.is_floating_point()]


class Recomputed:
    """An operation's results and gradients, in float64 and in the inputs' dtypes.

    Args:
        inputs: on the host.
        differentiable: indices of the inputs that have a gradient; empty for an operation without autograd.
    """

    def __init__(
        self, function: Callable, inputs: Sequence[object], options: dict[str, object], differentiable: Sequence[int]
    ) -> None:
        self.differentiable = list(differentiable)
        self._inputs, self._outputs = [], []
        for is_double in (True, False):
            held = [_as(value, is_double) for value in inputs]
            for number in self.differentiable:
                held[number].requires_grad_()
            with torch.set_grad_enabled(bool(self.differentiable)), _mode(is_double):
                self._outputs.append(floats(function(*held, **options)))
            self._inputs.append(held)

    def results(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The exact result, and the result rounded in the inputs' dtypes."""
        return list(zip(*self._outputs, strict=True))

    def gradients(self, grads: Sequence[torch.Tensor | None]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Number of an input -> its gradient, exact and rounded.

        Args:
            grads: gradient of each floating-point result, on the host; None if the result was not used.
        """
        found: list[tuple] = []
        for inputs, outputs in zip(self._inputs, self._outputs, strict=True):
            used = [(out, g.to(out.dtype)) for out, g in zip(outputs, grads, strict=True) if g is not None]
            wanted = [inputs[number] for number in self.differentiable]
            with torch.enable_grad():
                results, given = map(list, zip(*used, strict=True))
                found.append(torch.autograd.grad(results, wanted, given, allow_unused=True))
        pairs = zip(self.differentiable, *found, strict=True)
        return {n: (exact, rounded) for n, exact, rounded in pairs if exact is not None}


def _as(value: object, is_double: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_floating_point() and is_double:
        return value.double()
    return value.clone()


def _mode(is_double: bool) -> contextlib.AbstractContextManager[object]:
    return _Double() if is_double else contextlib.nullcontext()


def deviation(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over that of the exact value; infinite if shapes differ or a value is not finite."""
    if found.shape != exact.shape:
        return float("inf")
    found = found.detach().cpu().double()
    if not found.isfinite().all():
        return float("inf")
    norm = exact.norm().item()
    gap = (found - exact).norm().item()
    return gap / norm if norm else (0.0 if gap == 0 else float("inf"))
