"""NVIDIA GPUs with NCCL."""

from __future__ import annotations

import os

import torch

from qwen3_npu.platform.base import Platform, published_peak
from qwen3_npu.platform.mcore_import import import_megatron
from qwen3_npu.watch.flight import FlightRecorder

# Dense bf16 FLOP/s without sparsity, from NVIDIA's data sheets.
PEAK_FLOPS = {"A100": 312e12, "A800": 312e12, "H100": 989e12, "H800": 989e12, "H200": 989e12, "H20": 148e12}
PEAK_FLOPS |= {"H100 PCIe": 756e12, "L40S": 362e12, "B200": 2250e12}


def why_not() -> str | None:
    """Why this device cannot be used; None if it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (torch.cuda.is_available() is False)"
    return None


def _bind(local_rank: int) -> torch.device:
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _be_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses


def platform() -> Platform:
    return Platform(
        name="cuda",
        backend="nccl",
        prepare=import_megatron,
        bind=_bind,
        synchronize=torch.cuda.synchronize,
        memory_peak=torch.cuda.max_memory_allocated,
        memory_total=lambda: torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory,
        device_name=torch.cuda.get_device_name,
        peak_flops=lambda: published_peak(PEAK_FLOPS, torch.cuda.get_device_name()),
        flight_recorder=FlightRecorder(
            "TORCH_FR_BUFFER_SIZE",
            "TORCH_NCCL_DUMP_ON_TIMEOUT",
            "TORCH_NCCL_DEBUG_INFO_PIPE_FILE",
            "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
        ),
        event=lambda: torch.cuda.Event(enable_timing=True),
        overlaps_p2p_safely=True,
        be_deterministic=_be_deterministic,
    )
