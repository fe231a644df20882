"""Record every kernel call and every layer of a step, forward and backward, in the order of computation.

A kernel is wrapped: it gets views of its activations, whose gradients belong to this call alone. Weights are passed as
they are, since kernels add their gradients to megatron's sums themselves (`main_grad`). In a step that is not recorded
the wrapper costs one comparison per call; without a recorder there is no wrapper.

A name is `step|micro-batch|module|operation#call|forward or backward|tensor`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from qwen3_npu.kernels import OPERATIONS, Kernels, reference
from qwen3_npu.training.fingerprints.exact import Recomputed, definition, deviation, floats, host_copy
from qwen3_npu.training.fingerprints.sketch import NUMBERS, sketch

LAYER = "layer"  # the operation of records that are the same in every layout
# It gives a function that holds a weight; its sums are parts of a weight's, which is looked at as a whole.
_NOT_FOLLOWED = ("prepared_linear", "add_grouped_gradient")


class Noted(NamedTuple):
    """Records of some steps, one row each.

    Attributes:
        rows: [n, NUMBERS + 2] float32: a `sketch`, the deviation from the exact result and the deviation that rounding
            explains (NaN: not computed again).
        raised: the exception of an operation, or None.
    """

    names: list[str]
    rows: np.ndarray
    raised: str | None = None


class StepRecorder:
    """One rank's part.

    Args:
        due: step -> whether it is recorded.
        sink: receives the records of each such step; every rank calls it.
        exact: compute every kernel and linear again on the host; for tiny models. All micro-batches are recorded
            then, else the first one.
    """

    def __init__(self, due: Callable[[int], bool], sink: Callable[[int, Noted], None], *, exact: bool = False) -> None:
        self.due, self.sink, self.exact = due, sink, exact
        self.step = self.micro_batch = 0
        self.is_open = self.is_live = False  # a step, and the micro-batch that is computed, are recorded
        self.rows: tuple[torch.Tensor, int] | None = None  # of layers' outputs, where ranks hold parts of the tokens
        self.groups: list[dist.ProcessGroup] = []  # over which these parts add up
        self.last: str | None = None  # the call that is computed, or whose gradients are
        self._where: list[str] = [""]
        self._chunks: Sequence[GPTModel] = ()
        self._weights: dict[int, str] = {}  # id of a parameter -> its name, with the layer's number in the whole model
        self._started: collections.Counter = collections.Counter()  # micro-batches of a chunk
        self._reset()

    def _reset(self) -> None:
        self._names: list[str] = []
        self._numbers: list[torch.Tensor] = []
        self._checks: list[tuple[float, float]] = []
        self._calls: collections.Counter = collections.Counter()
        self._indices: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of `permute`: the kernel's, the reference's
        self._uses: collections.Counter = collections.Counter()  # of a weight, by name
        self._expected: dict[str, _Sum] = {}

    def wrapped(self, kernels: Kernels) -> Kernels:
        """Kernels that report their calls to this recorder."""
        chosen = {name: getattr(kernels, name) for name in OPERATIONS if name not in _NOT_FOLLOWED}
        if chosen["add_weight_gradient"] is reference.add_weight_gradient:
            del chosen["add_weight_gradient"]  # which leaves the sums to megatron, and is known by its identity
        return dataclasses.replace(kernels, **{name: self._wrapped(name, k) for name, k in chosen.items()})

    def _wrapped(self, name: str, kernel: Callable) -> Callable:
        @functools.wraps(kernel)
        def call(*inputs: object, **options: object) -> object:
            if not self.is_live:
                return kernel(*inputs, **options)
            if name != "grouped_matmul":
                return self.call(name, kernel, inputs, options)
            product, defined = kernel(*inputs), reference.grouped_matmul(*map(host_copy, inputs))
            return lambda *factors: self.call(name, product, factors, {}, defined=defined)

        return call

    def attach(self, chunks: Sequence[GPTModel]) -> None:
        """Follow the (unwrapped) modules of this rank; `finalize_model_grads_func` completes their gradients."""
        self._chunks = chunks
        for chunk in chunks:
            chunk.register_forward_pre_hook(self._starts)
            layers = {f"decoder.layers.{i}": layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}
            for name, parameter in chunk.named_parameters():
                self._weights[id(parameter)] = _global(name, layers)
            for name, module in chunk.named_modules():
                known = _global(name, layers)
                module.register_forward_pre_hook(functools.partial(self._enters, known))
                module.register_forward_hook(self._leaves, always_call=True)
                if name in layers or name == "embedding":
                    module.register_forward_hook(functools.partial(self._layer, known))
                elif self.exact and isinstance(module, ColumnParallelLinear | RowParallelLinear):
                    self._follow_linear(module)
        config = chunks[0].config
        config.finalize_model_grads_func = self._finalizes(config.finalize_model_grads_func)

    def begin(self, step: int) -> None:
        """Call it before a step."""
        self.step, self.is_open = step, self.due(step)
        self._started.clear()
        self._reset()

    def end(self) -> None:
        """Call it after a step; the records go to the sink."""
        if self.is_open:
            self.is_open = self.is_live = False
            self.sink(self.step, self.take())

    def take(self, error: Exception | None = None) -> Noted:
        """The records since the last `begin`, up to an error."""
        numbers = torch.stack(self._numbers) if self._numbers else torch.zeros(0, NUMBERS)
        shared = torch.tensor([f"|{LAYER}#" in name for name in self._names], device=numbers.device)
        for group in self.groups if len(numbers) else ():
            part = numbers[shared]
            dist.all_reduce(part, group=group)
            numbers[shared] = part
        checks = np.array(self._checks, np.float32).reshape(-1, 2)
        raised = None if error is None else f"{self.last}: {(str(error) or repr(error)).splitlines()[0]}"
        noted = Noted(self._names, np.concatenate((numbers.float().cpu().numpy(), checks), 1), raised)
        self._reset()
        return noted

    # Modules

    def _starts(self, module: torch.nn.Module, _: object) -> None:
        self._started[id(module)] += 1
        self.micro_batch = self._started[id(module)]
        self.is_live = self.is_open and (self.exact or self.micro_batch == 1)

    def _enters(self, name: str, *_: object) -> None:
        self._where.append(name)

    def _leaves(self, *_: object) -> None:
        self._where.pop()

    def _layer(self, name: str, module: torch.nn.Module, _: object, output: torch.Tensor | tuple) -> None:
        if not self.is_live:
            return
        out = output[0] if isinstance(output, tuple) else output
        label = f"{self.step}|{self.micro_batch}|{name}|{LAYER}#1"
        self._note(f"{label}|forward|out", out, shared=True)
        if out.requires_grad:
            out.register_hook(lambda grad: self._note(f"{label}|backward|d_out", grad, shared=True))

    def _follow_linear(self, module: ColumnParallelLinear | RowParallelLinear) -> None:
        """Follow a linear on one rank only: the output of a shard is summed or scattered inside the module."""
        if module.tp_group.size() > 1 or module.bias is not None:
            return
        plain = module.forward

        def forward(x: torch.Tensor, weight: torch.Tensor | None = None, **others: object) -> tuple[torch.Tensor, None]:
            if not self.is_live:
                return plain(x, weight=weight, **others) if weight is not None else plain(x, **others)
            chosen = module.weight if weight is None else weight
            given = {} if weight is None else {"weight": weight}
            return self.call("linear", lambda x, _: plain(x, **given, **others)[0], (x, chosen), {}), None

        vars(module)["forward"] = forward

    # Calls

    def call(
        self,
        operation: str,
        function: Callable,
        inputs: Sequence[Any],
        options: dict[str, object],
        *,
        defined: Callable | None = None,
    ) -> Any:
        """The function's result. It is recorded, and later its gradients."""
        where = f"{self.micro_batch}|{self._where[-1]}|{operation}"
        self._calls[where] += 1
        call = NotedCall(self, f"{self.step}|{where}#{self._calls[where]}", inputs)
        self.last = call.name
        self._called(call, inputs)
        if self.exact and not options.get("dropout"):
            call.recomputed = self._recomputed(operation, inputs, options, defined=defined, call=call)
        result = function(*call.given, **options)
        if operation == "permute":
            self._indices[id(result[2])] = result[2], call.indices
        if operation == "add_weight_gradient":
            call.returns([inputs[2]])
            return result
        # Views, whose gradients are those of what uses a result later: an operation may use its result itself.
        is_one, is_tracked = isinstance(result, torch.Tensor), torch.is_grad_enabled()
        outs = [
            r.view_as(r) if is_tracked and floats(r) and r.requires_grad else r
            for r in ([result] if is_one else result)
        ]
        call.returns(floats(outs))
        return outs[0] if is_one else type(result)(outs)

    def _called(self, call: NotedCall, inputs: Sequence[object]) -> None:
        """Hook for recorders that record inputs, too."""

    def _recomputed(
        self,
        operation: str,
        inputs: Sequence[Any],
        options: dict[str, object],
        *,
        defined: Callable | None,
        call: NotedCall,
    ) -> Recomputed | None:
        if operation == "cross_entropy" and inputs[2].size() > 1:
            return None
        host, function = list(map(host_copy, inputs)), defined or definition(operation)
        if operation == "permute":
            call.indices = reference.permute(*host)[2]
        elif operation == "unpermute":
            host[1] = self._indices[id(inputs[1])][1]
        return Recomputed(function, host, {k: host_copy(v) for k, v in options.items()}, call.differentiable)

    def _note(self, name: str, tensor: torch.Tensor, check: tuple[float, float] | None = None, **kind: bool) -> None:
        rows, length = self.rows if self.rows is not None and kind.get("shared") else (None, 0)
        self._names.append(name)
        self._numbers.append(sketch(tensor, rows, length))
        self._checks.append(check or (float("nan"), float("nan")))

    # Weights

    def weight_name(self, parameter: torch.nn.Parameter) -> str:
        return self._weights.get(id(parameter), "of a probe")

    def _finalizes(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def finalize(*args: object, **kwargs: object) -> Any:
            if self.is_open and self.exact:
                self._check_weights()
            done = function(*args, **kwargs)
            if self.is_open and not self.exact:
                for chunk in self._chunks:
                    for parameter in chunk.parameters():
                        if (total := getattr(parameter, "main_grad", None)) is not None:
                            self._note(f"{self.step}|0|{self.weight_name(parameter)}|sum#1|backward|gradient", total)
            return done

        return finalize

    def _check_weights(self) -> None:
        """Compare this rank's gradient sums with those of the recomputed gradients."""
        for chunk in self._chunks:
            for parameter in chunk.parameters():
                name = self.weight_name(parameter)
                known = self._expected.get(name)
                if known is not None and known.calls == self._uses[name]:
                    found = vars(parameter)["main_grad"]
                    check = deviation(found, known.exact), deviation(known.rounded, known.exact)
                    label = f"{self.step}|0|{name}|{known.operation}#1|backward|gradient of the weight"
                    self._note(label, found, check)


class _Sum:
    """The sum of a weight's gradients, by its recomputed calls."""

    def __init__(self, operation: str, shape: torch.Size) -> None:
        self.operation, self.calls = operation, 0
        self.exact = torch.zeros(shape, dtype=torch.float64)
        self.rounded = torch.zeros(shape)


class NotedCall:
    """One call of one operation, until its gradients are known."""

    def __init__(self, recorder: StepRecorder, name: str, inputs: Sequence[Any]) -> None:
        self.recorder, self.name = recorder, name
        self.recomputed: Recomputed | None = None
        self.indices = torch.zeros(0)
        tracked = torch.is_grad_enabled()
        self.differentiable = [
            i
            for i, value in enumerate(inputs)
            if tracked and isinstance(value, torch.Tensor) and value.is_floating_point() and value.requires_grad
        ]
        self.weights = {i: weight for i in self.differentiable if (weight := _parameter(inputs[i])) is not None}
        for weight in self.weights.values():
            recorder._uses[recorder.weight_name(weight)] += 1
        self.given = list(inputs)
        for i in self.differentiable:
            if i not in self.weights:
                self.given[i] = inputs[i].view_as(inputs[i])
                self.given[i].register_hook(functools.partial(self._gradient, i))
        self.grads: list[torch.Tensor | None] = []
        self._exact: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None

    def returns(self, outputs: list[torch.Tensor]) -> None:
        known = self.recomputed.results() if self.recomputed is not None else [None] * len(outputs)
        self.grads = [None] * len(outputs)
        for number, (out, pair) in enumerate(zip(outputs, known, strict=True)):
            self._note("forward", f"out {number}", out, pair)
            if out.requires_grad and self.differentiable:
                out.register_hook(functools.partial(self._arrives, number))

    def _note(self, way: str, what: str, tensor: torch.Tensor, pair: tuple | None) -> None:
        check = None if pair is None else (deviation(tensor, pair[0]), deviation(pair[1], pair[0]))
        self.recorder._note(f"{self.name}|{way}|{what}", tensor, check)

    def _arrives(self, number: int, grad: torch.Tensor) -> None:
        self.recorder.last = f"{self.name}|backward"
        self.grads[number] = host_copy(grad) if self.recomputed is not None else None
        self._note("backward", f"gradient of out {number}", grad, None)

    def _gradient(self, number: int, grad: torch.Tensor) -> None:
        if self.recomputed is not None and self._exact is None:
            self._exact = self.recomputed.gradients(self.grads)
            self._add_weights(self._exact)
        self._note("backward", f"gradient of input {number}", grad, (self._exact or {}).get(number))

    def _add_weights(self, exact: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        for number, weight in self.weights.items():
            if number in exact:
                name, operation = self.recorder.weight_name(weight), self.name.split("|")[3].split("#")[0]
                total = self.recorder._expected.setdefault(name, _Sum(operation, weight.shape))
                total.calls += 1
                for into, gradient in zip((total.exact, total.rounded), exact[number], strict=True):
                    into += gradient.view(weight.shape)


def _parameter(value: torch.Tensor) -> torch.nn.Parameter | None:
    """The weight that a tensor is, or is a view of."""
    if isinstance(value, torch.nn.Parameter):
        return value
    return value._base if isinstance(value._base, torch.nn.Parameter) else None


def _global(name: str, layers: dict[str, int]) -> str:
    """A module's or weight's name in the whole model. Args: layers: prefix in this chunk -> number of the layer."""
    prefix = next((p for p in layers if name == p or name.startswith(f"{p}.")), None)
    return name if prefix is None else f"layers.{layers[prefix]}{name.removeprefix(prefix)}"
