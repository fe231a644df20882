"""The operations that have a kernel per device, and the choice of their implementation.

`reference` defines the correct result in plain torch. Every other implementation must match it, forward and gradient.
The model's ModuleSpec passes a kernel to the module that calls it (`model/spec.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType

from qwen3_npu import log
from qwen3_npu.errors import UsageError, did_you_mean

# --kernels name -> module. A module holds the operations that it has; the next one in its chain serves the others.
MODULES = {"reference": "reference", "torch": "torch_native", "cuda": "cuda", "npu": "npu", "mindspeed": "mindspeed"}
# Module -> name. The reference of cross_entropy has a file of its own.
_NAMES = {module: name for name, module in MODULES.items()} | {"cross_entropy": "reference"}
_CHAINS = {
    "reference": ("reference",),
    "torch": ("torch", "reference"),
    "cuda": ("cuda", "torch", "reference"),
    "npu": ("npu", "reference"),
    "mindspeed": ("mindspeed", "npu", "reference"),
}
IMPLEMENTATIONS = ("auto", *MODULES)
# Implementation -> the only device it runs on; the device's and its kernels' names in errors.
_DEVICE_OF = {"cuda": "cuda", "npu": "npu", "mindspeed": "npu"}
_DEVICES = {"cuda": "a CUDA GPU", "npu": "an NPU"}
_OWNERS = {"cuda": "the GPU's", "npu": "torch_npu's"}


@dataclasses.dataclass(frozen=True)
class Kernels:
    """One implementation per operation; signatures are those in `kernels/reference.py`."""

    attention: Callable
    decode_attention: Callable
    attention_block: Callable
    attention_block_backward: Callable
    rms_norm: Callable
    add_rms_norm: Callable
    add_weight_gradient: Callable
    rotary: Callable
    swiglu: Callable
    weighted_swiglu: Callable
    grouped_matmul: Callable
    add_grouped_gradient: Callable
    prepared_linear: Callable
    permute: Callable
    unpermute: Callable
    cross_entropy: Callable

    def __str__(self) -> str:
        """The --kernels name that serves most operations, then the other names with their operations."""
        chosen: dict[str, list[str]] = {}
        for field in dataclasses.fields(self):
            module = getattr(self, field.name).__module__.rsplit(".", 1)[-1]
            chosen.setdefault(_NAMES.get(module, module), []).append(field.name)
        first, *others = sorted(chosen.items(), key=lambda item: -len(item[1]))
        return "; ".join([first[0], *(f"{where}: {' '.join(operations)}" for where, operations in others)])


OPERATIONS = tuple(field.name for field in dataclasses.fields(Kernels))


def select_kernels(name: str, device: str = "cpu", overrides: Sequence[str] = ()) -> Kernels:
    """The kernels for `--kernels` and `--kernel-overrides`.

    Args:
        name: implementation; `auto` is torch_npu's on an NPU, Triton's on a GPU (if installed), else torch's.
        device: "npu", "cuda" or "cpu".
        overrides: `operation=implementation`.

    Raises:
        UsageError: the name is unknown, or the implementation is not available, with the reason.
    """
    if name not in IMPLEMENTATIONS:
        raise UsageError(f"--kernels {name}: known are {', '.join(IMPLEMENTATIONS)}")
    chosen = {operation: _serve(operation, name, device, f"--kernels {name}") for operation in OPERATIONS}
    for override in overrides:
        operation, _, implementation = override.partition("=")
        if operation not in OPERATIONS or implementation not in IMPLEMENTATIONS:
            hint = did_you_mean(operation, OPERATIONS)
            raise UsageError(
                f"--kernel-overrides {override}: give operation=implementation{hint}; operations: "
                f"{', '.join(OPERATIONS)}; implementations: {', '.join(IMPLEMENTATIONS)}"
            )
        chosen[operation] = _serve(operation, implementation, device, f"--kernel-overrides {override}")
    return Kernels(**chosen)


def _serve(operation: str, name: str, device: str, flag: str) -> Callable:
    """The kernel of one operation from an implementation or its fallbacks. `auto` may fall back, with a warning."""
    if name == "auto":
        name = device if device in _OWNERS else "torch"
        if name == "cuda" and importlib.util.find_spec("triton") is None:
            tell_once("torch's kernels instead of the GPU's: triton is not installed; --kernels cuda needs it")
            name = "torch"
        elif name != "torch" and (reason := _module(name, flag).why_no_kernel(operation)) is not None:
            log.info(
                f"warning: {operation} without {_OWNERS[name]} kernel: {reason}; --kernels {name} makes this an error"
            )
            name = "torch"
    if (needed := _DEVICE_OF.get(name, device)) != device:
        raise UsageError(f"{flag}: runs on {_DEVICES[needed]} only, and the device is {device}; use --kernels auto")
    for link in _CHAINS[name]:
        module = _module(link, flag)
        if hasattr(module, operation):
            if reason := getattr(module, "why_no_kernel", lambda operation: None)(operation):
                raise UsageError(f"{flag}: {operation}: {reason}; use --kernels auto")
            return getattr(module, operation)
    raise AssertionError(f"{operation} is nowhere")


@functools.cache
def tell_once(message: str) -> None:
    """Give a warning once that every layer would give."""
    log.info(f"warning: {message}")


def _module(name: str, flag: str) -> ModuleType:
    try:
        return importlib.import_module(f"qwen3_npu.kernels.{MODULES[name]}")
    except ModuleNotFoundError as error:
        raise UsageError(f"{flag}: {error.name} is not installed") from None
