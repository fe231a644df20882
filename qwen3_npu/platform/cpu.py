"""CPU with gloo: laptops, tests, CI."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys

import psutil
import torch

from qwen3_npu.platform.base import Platform


def why_not() -> str | None:
    """Why this device cannot be used; None if it can."""
    if torch.cuda.is_available():
        # The redirect makes torch.cuda mean the CPU for the whole process; a GPU program may be relying on it.
        return "this machine has a CUDA GPU; hide it with CUDA_VISIBLE_DEVICES="
    return None


def _activate() -> None:
    from qwen3_npu.platform import cpu_redirect

    cpu_redirect.apply()


def _memory_peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) of each
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _return_freed_memory() -> None:
    # glibc learns to keep freed blocks of up to 32 MB, in pieces that the next pass does not fit into; mallopt(3).
    m_mmap_threshold, one_megabyte = -3, 1 << 20
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(m_mmap_threshold, one_megabyte)


def platform() -> Platform:
    return Platform(
        name="cpu",
        backend="gloo",
        prepare=_activate,
        bind=lambda local_rank: torch.device("cpu"),
        synchronize=lambda: None,
        memory_peak=_memory_peak,
        memory_total=lambda: psutil.virtual_memory().total,
        device_name=lambda: "CPU",
        peak_flops=lambda: None,
        # gloo sends from the tensor's own memory: freeing it early sends whatever comes to lie there.
        overlaps_p2p_safely=False,
        return_freed_memory=_return_freed_memory,
    )
