"""Ascend NPUs with HCCL, through the vendor's torch_npu.

Checked against the real torch_npu with emulated kernels; never run on an NPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable

import torch

from qwen3_npu.args.profile import ProfileArgs
from qwen3_npu.platform.base import Platform, Profiler, published_peak, replace
from qwen3_npu.platform.mcore_import import import_megatron
from qwen3_npu.watch.flight import FlightRecorder

# Dense bf16 FLOP/s of one device (for A3: of one die, which is one device). 354e12 is the figure published for the
# 64 GB 910B of Atlas 800T A2; for the others nothing was found that could be cited, so no MFU is printed there.
PEAK_FLOPS = {"Ascend910B1": 354e12, "Ascend910B2": 354e12}

# Variables that are set where the user has not: value and reason.
ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": ("1", "order of communication and computation that megatron-core counts on"),
    "HCCL_CONNECT_TIMEOUT": ("3600", "seconds for all ranks to come to the first collective; loading may take long"),
    "HCCL_IF_BASE_PORT": ("25809", "HCCL's own 60000 lies where Linux takes ports for other connections"),
    "PYTORCH_NPU_ALLOC_CONF": ("expandable_segments:True", "less memory lost between allocations"),
    "TASK_QUEUE_ENABLE": ("2", "operations are prepared in a second thread"),
    "TORCH_NPU_DEVICE_CAPABILITY": ("8.0", "torch 2.13's broadcast asks for it and fails without"),
}
# A variable that the left one cannot be combined with.
_EXCLUDED_BY = {"TASK_QUEUE_ENABLE": "ASCEND_LAUNCH_BLOCKING"}


def set_environment() -> None:
    """Set what the user has not. torch_npu reads these at the first use of the device."""
    for name, (value, _) in ENVIRONMENT.items():
        if os.environ.get(_EXCLUDED_BY.get(name, ""), "0") == "0":
            os.environ.setdefault(name, value)


def detect_corruption(how: str) -> None:
    """Switch on torch_npu's detection of silent corruption, which is read when torch_npu is imported.

    Args:
        how: as --npu-asd says.
    """
    checksum = ",with_checksum:true" if how == "checksum" else ""
    os.environ["NPU_ASD_CONFIG"] = f"enable:true{checksum}"


def why_not() -> str | None:
    """Why this device cannot be used; None if it can."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed; docs/npu.md says which one fits your CANN, python -m qwen3_npu.doctor also"
    set_environment()
    try:
        import torch_npu
    except (ImportError, OSError) as error:
        places = "/usr/local/Ascend/cann or /usr/local/Ascend/ascend-toolkit"
        return f"torch_npu cannot be imported ({error}); source CANN's set_env.sh first (in {places})"
    if not torch_npu.npu.is_available():
        return "torch_npu sees no NPU; check npu-smi info and ASCEND_RT_VISIBLE_DEVICES"
    return None


def _activate() -> None:
    warnings.filterwarnings("ignore", message="The return value of get_device_capability is only for compatibility")
    # The vendor's own redirect of torch.cuda to torch.npu (and of nccl to hccl). It tells what it does on two pages,
    # and resets the warning filters of the whole process; recorded, they are neither shown nor kept.
    with warnings.catch_warnings(record=True):
        import torch_npu
        from torch_npu.contrib import transfer_to_npu  # noqa: F401

    # megatron sets torch.cuda.default_generators, which torch_npu 2.7.1 leaves empty; they exist from the first use on.
    torch_npu.npu._lazy_call(lambda: replace("torch.cuda.default_generators", torch_npu.npu.default_generators))
    _call_types_cuda()
    import_megatron()


def _call_types_cuda() -> None:
    """Let `tensor.type()` be "torch.cuda.FloatTensor", which megatron's optimizers compare with."""
    original: Callable = torch.Tensor.type

    @functools.wraps(original)
    def typed(self: torch.Tensor, *args: object, **kwargs: object) -> object:
        result = original(self, *args, **kwargs)
        return result.replace("torch.npu.", "torch.cuda.", 1) if isinstance(result, str) else result

    replace("torch.Tensor.type", typed)


def _bind(local_rank: int) -> torch.device:
    import torch_npu

    torch_npu.npu.set_device(local_rank)
    return torch.device("npu", local_rank)


def _profiler(args: ProfileArgs) -> Profiler:
    """torch_npu's profiler; its recordings open in MindStudio Insight."""
    from torch_npu import profiler

    activities = [profiler.ProfilerActivity.NPU]
    if args.profile_with_cpu:
        activities.append(profiler.ProfilerActivity.CPU)
    level = {"level_none": "Level_none"}.get(args.profile_level, args.profile_level.capitalize())
    return profiler.profile(
        activities=activities,
        record_shapes=args.profile_record_shapes,
        profile_memory=args.profile_with_memory,
        with_stack=args.profile_with_stack,
        on_trace_ready=profiler.tensorboard_trace_handler(args.profile_save_path),
        experimental_config=profiler._ExperimentalConfig(profiler_level=getattr(profiler.ProfilerLevel, level)),
    )


def _be_deterministic() -> None:
    os.environ["HCCL_DETERMINISTIC"] = "true"


def platform() -> Platform:
    from torch_npu import npu

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
        flight_recorder=FlightRecorder(
            "TORCH_HCCL_TRACE_BUFFER_SIZE",
            "TORCH_HCCL_DUMP_ON_TIMEOUT",
            "TORCH_HCCL_DEBUG_INFO_PIPE_FILE",
            "TORCH_HCCL_DEBUG_INFO_TEMP_FILE",
        ),
        event=lambda: npu.Event(enable_timing=True),
        overlaps_p2p_safely=True,
        has_float64=False,
        profiler=_profiler,
        be_deterministic=_be_deterministic,
    )
