"""Ascend NPUs with HCCL, through the vendor's torch_npu.

Checked against torch_npu's documented interface; never run on an NPU.
"""

from __future__ import annotations

import importlib.util

import torch

from qwen3_npu.platform.base import Platform, published_peak

# Dense bf16 FLOP/s of one device, as published for the 64 GB 910B (Atlas 800T A2).
PEAK_FLOPS = {"Ascend910B": 354e12}


def why_not() -> str | None:
    """Why this device cannot be used; None if it can."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed (pip install qwen3-npu[npu])"
    try:
        import torch_npu
    except (ImportError, OSError) as error:
        return f"torch_npu cannot be imported ({error}); source CANN's set_env.sh first"
    if not torch_npu.npu.is_available():
        return "torch_npu sees no NPU; check npu-smi info and ASCEND_RT_VISIBLE_DEVICES"
    return None


def _activate() -> None:
    # The vendor's own redirect of torch.cuda to torch.npu (and of nccl to hccl).
    import torch_npu  # noqa: F401

    # transfer_to_npu does not touch torch.compile, which megatron's jit_fuser is.
    from megatron.core import jit
    from torch_npu.contrib import transfer_to_npu  # noqa: F401

    jit.disable_jit_fuser()


def _bind(local_rank: int) -> torch.device:
    torch.npu.set_device(local_rank)
    return torch.device("npu", local_rank)


def platform() -> Platform:
    npu = torch.npu
    return Platform(
        name="npu",
        backend="hccl",
        prepare=_activate,
        bind=_bind,
        synchronize=npu.synchronize,
        memory_peak=npu.max_memory_allocated,
        memory_total=lambda: npu.get_device_properties(npu.current_device()).total_memory,
        device_name=npu.get_device_name,
        peak_flops=lambda: published_peak(PEAK_FLOPS, npu.get_device_name()),
        overlaps_p2p_safely=True,
    )
