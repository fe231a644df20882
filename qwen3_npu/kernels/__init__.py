"""The operations worth a device's own kernel: one signature each, and which implementation serves.

`reference` is the definition of correct, in plain torch. Every other implementation must match it, forward and
gradient. The model's ModuleSpec hands a kernel to the module that calls it (`model/spec.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from qwen3_npu.errors import UsageError
from qwen3_npu.kernels import reference, torch_native

IMPLEMENTATIONS = ("auto", "reference", "torch")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """One implementation per operation; signatures are those in `kernels/reference.py`."""

    attention: Callable
    decode_attention: Callable
    attention_block: Callable
    attention_block_backward: Callable
    rms_norm: Callable
    rotary: Callable
    swiglu: Callable
    grouped_matmul: Callable
    prepared_linear: Callable

    def __str__(self) -> str:
        chosen = {f.name: getattr(self, f.name).__module__.rsplit(".", 1)[-1] for f in dataclasses.fields(self)}
        return " ".join(f"{name}={where}" for name, where in chosen.items())


_TABLES: dict[str, Kernels] = {
    "reference": Kernels(
        attention=reference.attention,
        decode_attention=reference.decode_attention,
        attention_block=reference.attention_block,
        attention_block_backward=reference.attention_block_backward,
        rms_norm=reference.rms_norm,
        rotary=reference.rotary,
        swiglu=reference.swiglu,
        grouped_matmul=reference.grouped_matmul,
        prepared_linear=reference.prepared_linear,
    ),
    "torch": Kernels(
        attention=torch_native.attention,
        decode_attention=torch_native.decode_attention,
        attention_block=torch_native.attention_block,
        attention_block_backward=torch_native.attention_block_backward,
        rms_norm=torch_native.rms_norm,
        rotary=torch_native.rotary,
        swiglu=torch_native.swiglu,
        grouped_matmul=reference.grouped_matmul,
        prepared_linear=torch_native.prepared_linear,
    ),
}


def select(name: str) -> Kernels:
    """The kernels for `--kernels`; `auto` takes torch's own fused operations."""
    if name not in IMPLEMENTATIONS:
        raise UsageError(f"--kernels {name}: known are {', '.join(IMPLEMENTATIONS)}")
    return _TABLES["torch" if name == "auto" else name]
