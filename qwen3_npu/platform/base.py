"""The interface of a device for the rest of the code."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable
from typing import Protocol

import torch

from qwen3_npu.args.profile import ProfileArgs
from qwen3_npu.watch.device import DeviceEvent
from qwen3_npu.watch.flight import FlightRecorder


class Profiler(Protocol):
    """Records between `start` and `stop`; writes the recording itself."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


def torch_profiler(args: ProfileArgs) -> Profiler:
    """torch's profiler of the host and, if there is one, the GPU."""
    return torch.profiler.profile(
        record_shapes=args.profile_record_shapes,
        profile_memory=args.profile_with_memory,
        with_stack=args.profile_with_stack,
        on_trace_ready=torch.profiler.tensorboard_trace_handler(args.profile_save_path),
    )


@dataclasses.dataclass(frozen=True)
class Platform:
    """A kind of device.

    Attributes:
        name: "npu", "cuda" or "cpu".
        backend: collective backend for `init_process_group`.
        prepare: makes megatron-core work here (call `activate`).
        bind: local rank -> the device of this process, made current.
        synchronize: wait for the device.
        memory_peak: largest number of allocated bytes (cpu: of the resident set) so far.
        memory_total: bytes of one device.
        device_name: the vendor's name of it.
        peak_flops: published dense bf16 FLOP/s of one device, or None if unknown.
        has_float64: whether the device computes in float64.
        profiler: makes a profiler by --profile's flags.
        be_deterministic: settings for --deterministic, before the process groups are made.
        event: makes a timing event of the device; None if the host computes.
        flight_recorder: environment variables of the backend's recorder of collectives; None if it has none.
        overlaps_p2p_safely: whether pipeline output may be freed while it is being sent.
        return_freed_memory: from now on return large freed blocks to the system at once: saves memory, costs time.
    """

    name: str
    backend: str
    prepare: Callable[[], None]
    bind: Callable[[int], torch.device]
    synchronize: Callable[[], None]
    memory_peak: Callable[[], int]
    memory_total: Callable[[], int]
    device_name: Callable[[], str]
    peak_flops: Callable[[], float | None]
    overlaps_p2p_safely: bool
    event: Callable[[], DeviceEvent] | None = None
    flight_recorder: FlightRecorder | None = None
    has_float64: bool = True
    profiler: Callable[[ProfileArgs], Profiler] = torch_profiler
    be_deterministic: Callable[[], None] = lambda: None
    return_freed_memory: Callable[[], None] = lambda: None

    def activate(self) -> None:
        """Make megatron-core work on this device. Call it before megatron is imported."""
        # At import megatron warns of what we chose not to use (apex, Transformer Engine), and of deprecations.
        warnings.filterwarnings("ignore", module=r"megatron\.")
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated")
        logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(
            # A warning for every MLP that comes from a spec.
            lambda record: "Unknown MLP type" not in record.getMessage()
        )
        self.prepare()
        from qwen3_npu.platform import mcore_fixes

        mcore_fixes.apply()


def published_peak(table: dict[str, float], device_name: str) -> float | None:
    """The entry of the longest key contained in the device's name; None if there is none."""
    keys = [key for key in table if key.lower() in device_name.lower()]
    return table[max(keys, key=len)] if keys else None


def replace(name: str, value: object) -> None:
    """Let a full name such as "torch.Tensor.type" mean `value`, everywhere in this process."""
    owner_name, attribute = name.rsplit(".", 1)
    parts = owner_name.split(".")
    owner: object = __import__(parts[0])
    for index, part in enumerate(parts[1:], start=2):
        if not hasattr(owner, part):
            __import__(".".join(parts[:index]))
        owner = getattr(owner, part)
    setattr(owner, attribute, value)
