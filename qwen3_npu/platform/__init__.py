"""The device: the only package that names a vendor. `select_platform` chooses it once."""

from __future__ import annotations

from qwen3_npu.errors import UsageError
from qwen3_npu.platform.base import Platform


def select_platform(name: str, npu_asd: str | None = None) -> Platform:
    """The platform for `--device`; `auto` takes an NPU, then a CUDA GPU, then the CPU.

    Args:
        npu_asd: --npu-asd.

    Raises:
        UsageError: the requested device is not available, with the reason.
    """
    from qwen3_npu.platform import cpu, cuda, npu

    if npu_asd is not None:
        npu.detect_corruption(npu_asd)
        if name not in ("auto", "npu") or npu.why_not() is not None:
            raise UsageError(f"--npu-asd {npu_asd}: torch_npu does this, and the device is no NPU; drop the flag")
    if name == "auto":
        found = next((p for p in (npu, cuda) if p.why_not() is None), cpu)
        return found.platform()
    module = {"npu": npu, "cuda": cuda, "cpu": cpu}[name]
    if reason := module.why_not():
        raise UsageError(f"--device {name}: {reason}; use --device auto for the device that is available")
    return module.platform()
