"""Make "cuda" mean the CPU, so that megatron-core runs where there is no accelerator.

The counterpart of torch_npu.contrib.transfer_to_npu. `REDIRECTED` is the complete list; a test pins it. Each entry
names the code of megatron-core 0.16.1 that needs it. Apply it before megatron is imported, which copies some names.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

from qwen3_npu.platform.base import replace
from qwen3_npu.platform.mcore_import import import_megatron


class _Stream:
    """A CUDA stream or event where everything is synchronous already."""

    def __init__(self, *_: object, **__: object) -> None:
        self.time = time.perf_counter()

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def record_event(self, event: _Stream | None = None) -> _Stream:
        return event if event is not None else _Stream()

    def record(self, stream: object = None) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, other: _Stream) -> float:
        return (other.time - self.time) * 1e3

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


class _Generators:
    """`torch.cuda.default_generators`: on the CPU there is one generator."""

    def __getitem__(self, index: object) -> torch.Generator:
        return torch.default_generator


@contextlib.contextmanager
def _stream_context(stream: object) -> Iterator[None]:
    yield


def _on_cpu(factory: Callable) -> Callable:
    """A tensor factory that takes device="cuda" as the CPU."""

    @functools.wraps(factory)
    def wrapper(*args: object, **kwargs: object) -> object:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return wrapper


def _cuda_type_name(original: Callable) -> Callable:
    @functools.wraps(original)
    def wrapper(self: torch.Tensor, *args: object, **kwargs: object) -> object:
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return wrapper


def _splits_to_host(tensor: object, as_numpy: bool = False, record_stream: bool = False) -> object:
    """megatron's `maybe_move_tensor_to_cpu` where the tensor is there already."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _uneven_all_gather(original: Callable) -> Callable:
    """gloo gathers equal sizes only; NCCL and HCCL also others."""

    @functools.wraps(original)
    def wrapper(
        tensor_list: list, tensor: torch.Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
    ) -> object:
        if len({t.shape for t in tensor_list}) == 1:
            return original(tensor_list, tensor, group=group, async_op=async_op)
        for rank, part in enumerate(tensor_list):
            source = dist.get_global_rank(group or dist.distributed_c10d._get_default_group(), rank)
            if source == dist.get_rank():
                part.copy_(tensor)
            dist.broadcast(part, source, group=group)
        return None

    return wrapper


def _reduce_scatter(
    output: torch.Tensor,
    input_list: list,
    op: object = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> None:
    """gloo has it for equal sizes only, and with torch 2.7 not at all."""
    for rank, part in enumerate(input_list):
        part = part.clone()
        dist.all_reduce(part, op=op, group=group)
        if rank == dist.get_rank(group):
            output.copy_(part)


def _get_rng_state(device: object = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: object = None) -> None:
    torch.set_rng_state(state)


def _replacements() -> dict[str, tuple[object, str]]:
    """Full name -> (replacement, who needs it)."""
    nothing = lambda *args, **kwargs: None  # noqa: E731
    table: dict[str, tuple[object, str]] = {
        "torch.cuda.current_device": (lambda: torch.device("cpu"), "device= of every allocation"),
        "torch.cuda.synchronize": (nothing, "pipeline p2p, timers"),
        "torch.cuda.empty_cache": (nothing, "checkpointing"),
        "torch.cuda.Stream": (_Stream, "DDP and all-to-all side streams"),
        "torch.cuda.Event": (_Stream, "all-to-all dispatcher"),
        "torch.cuda.stream": (_stream_context, "with torch.cuda.stream(...)"),
        "torch.cuda.current_stream": (lambda device=None: _Stream(), "waits between streams"),
        "torch.cuda.default_stream": (lambda device=None: _Stream(), "DDP buckets"),
        "torch.cuda.manual_seed": (lambda seed: torch.default_generator.manual_seed(seed), "RNG tracker"),
        "torch.cuda.get_rng_state": (_get_rng_state, "RNG tracker"),
        "torch.cuda.random.get_rng_state": (_get_rng_state, "RNG tracker"),
        "torch.cuda.default_generators": (_Generators(), "RNG tracker"),
        # Without CUDA torch queues these calls for ever: seeds would silently never be applied.
        "torch.cuda._lazy_call": (lambda call, **kwargs: call(), "RNG tracker"),
        "torch.Tensor.cuda": (lambda self, *args, **kwargs: self, "schedules, optimizer, embedding"),
        "torch.nn.Module.cuda": (lambda self, *args, **kwargs: self, "model.cuda()"),
        "torch.Tensor.record_stream": (lambda self, stream: None, "all-to-all dispatcher"),
        "torch.Tensor.type": (_cuda_type_name(torch.Tensor.type), "optimizers compare with 'torch.cuda.FloatTensor'"),
        "torch.distributed.all_gather": (_uneven_all_gather(dist.all_gather), "all-to-all dispatcher under ETP"),
        "torch.distributed.reduce_scatter": (_reduce_scatter, "its backward"),
    }
    for name in ("zeros", "ones", "empty", "full", "tensor", "arange"):
        table[f"torch.{name}"] = (_on_cpu(getattr(torch, name)), "device='cuda' literals")
    return table


# In megatron's own namespaces: the two places that ask a tensor whether it is on a GPU.
_MEGATRON = {
    "megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu": (_splits_to_host, "all-to-all split sizes"),
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu": (_splits_to_host, "the same, copied"),
}

REDIRECTED: dict[str, str] = {name: why for name, (_, why) in (_replacements() | _MEGATRON).items()}
_applied = False


def apply() -> None:
    """Redirect, once per process."""
    global _applied
    if _applied:
        return
    _applied = True
    # torch caches the set of factories that `with torch.device(...)` acts on at its first use; it must hold the
    # originals, which the wrappers call, or such blocks (transformers loads models in one) lose their effect.
    _device_constructors()
    for name, (value, _) in _replacements().items():
        replace(name, value)

    import_megatron()
    for name, (value, _) in _MEGATRON.items():
        replace(name, value)
    # CPU and "GPU" share one generator here, so the tracker's check that only the GPU's moved always fires.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
