"""Which machine this is: the one package that may name a vendor. Chosen once, by `select_platform`."""

from __future__ import annotations

from qwen3_npu.errors import UsageError
from qwen3_npu.platform.base import Platform

DEVICES = ("auto", "npu", "cuda", "cpu")


def select_platform(name: str) -> Platform:
    """The platform for `--device`; `auto` takes an NPU, then a CUDA GPU, then the CPU.

    Raises:
        UsageError: the device asked for is not there, with the reason.
    """
    from qwen3_npu.platform import cpu, cuda, npu

    if name == "auto":
        found = next((p for p in (npu, cuda) if p.why_not() is None), cpu)
        return found.platform()
    module = {"npu": npu, "cuda": cuda, "cpu": cpu}[name]
    if reason := module.why_not():
        raise UsageError(f"--device {name}: {reason}; use --device auto to take what is there")
    return module.platform()
