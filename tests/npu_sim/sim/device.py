"""Tensors on the simulated device: torch_npu's own memory, aten operations computed on the host over that memory."""

from __future__ import annotations

import collections
import ctypes
import functools
import hashlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch_npu
from torch.utils._pytree import tree_leaves, tree_map

from sim import aicpu, streams

# What torch_npu does itself, without a kernel: memory, views, copies between host and device.
_TORCH_NPU = """empty.memory_format empty_strided empty_like new_empty_strided new_empty as_strided view
    _reshape_alias unfold record_stream _pin_memory is_pinned pin_memory resize_ set_ set_.source_Tensor
    set_.source_Storage set_.source_Storage_storage_offset _local_scalar_dense is_set_to
    _has_compatible_shallow_copy_type alias detach _to_copy lift_fresh storage_resize_"""
# Copies are between devices by nature; an index may lie on the host.
_MIXED = ("copy_", "_copy_from", "_copy_from_and_resize", "index.Tensor", "index_put_", "_index_put_impl_")
_RANDOM = ("normal", "uniform", "random", "bernoulli", "exponential", "multinomial", "randperm", "rand", "dropout")
# Computed in `operations`, behind torch_npu's own host code; and what nothing here needs.
ELSEWHERE = ("native_dropout", "native_dropout_backward")
_REFUSED = ("dropout", "_fused_dropout")
_library = torch.library.Library("aten", "IMPL")
_crossings: collections.Counter[str] = collections.Counter()


def counts() -> collections.Counter[str]:
    """How often the host has waited for the device, and copies between the two, since the process began."""
    return collections.Counter({**_crossings, "waits": _crossings["waits"] + _cann().stub_waits()})


@functools.cache
def _cann() -> ctypes.CDLL:
    return ctypes.CDLL("libascendcl.so")


def _note_copy(to: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> None:
    """A copy waits, as torch_npu's does, unless it was asked not to and the host's memory is pinned."""
    on_host = [t for t in (to, source) if t.device.type != "npu"]
    if on_host:
        _crossings["copies"] += 1
        _crossings["waits"] += not (non_blocking and on_host[0].is_pinned())


def host(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a CPU tensor, which keeps it alive: a transfer may outlive the device's tensor."""
    if tensor.device.type != "npu":
        return tensor
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    memory.owner = storage
    flat = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=tensor.dtype).set_(flat, tensor.storage_offset(), tensor.shape, tensor.stride())


def to_device(value: Any, device: torch.device) -> Any:
    """A CPU tensor in device memory; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
        return value
    out = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    host(out).copy_(value)
    return out


def device_of(name: str, values: Iterable[Any]) -> torch.device | None:
    """The device of the tensors among the values.

    Raises:
        RuntimeError: they are on several; as on a real device, numbers (0-dim tensors) may be anywhere.
    """
    tensors = [t for t in tree_leaves(list(values)) if isinstance(t, torch.Tensor)]
    devices = {t.device for t in tensors if t.dim()}
    if len(devices) > 1 and not name.startswith(_MIXED):
        raise RuntimeError(f"{name}: expected all tensors on one device, found {sorted(map(str, devices))}")
    return next((t.device for t in tensors if t.device.type == "npu"), None)


def generator(device: torch.device, given: torch.Generator | None) -> torch.Generator:
    """A host generator for one random operation, from the state of the device's, which moves on."""
    torch.npu.current_device()  # the generators exist from the first use of the device on
    source = given if given is not None else torch.npu.default_generators[device.index]
    state = source.get_state()
    digest = hashlib.sha256(state.numpy().tobytes()).digest()
    words = state.view(torch.int64)  # seed, offset
    words[-1] += 4
    source.set_state(state)
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _on_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return host(value)
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _matmul_backward(grad: torch.Tensor, a: torch.Tensor, b: torch.Tensor, wanted: list[bool]) -> tuple:
    """A gradient that the host does not have as an operation of its own."""
    if b.dim() != 2:
        raise NotImplementedError(f"the gradient of matmul with {tuple(b.shape)} is not emulated")
    grads = grad @ b.t(), a.flatten(0, -2).t() @ grad.flatten(0, -2)
    return tuple(g if want else None for g, want in zip(grads, wanted, strict=True))


_OWN = {"matmul_backward": _matmul_backward}


def _emulated(operation: Any, name: str) -> Callable:
    compute = _OWN.get(name, operation)
    schema = operation._schema
    written = [i for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]
    names = [a.name for a in schema.arguments]
    is_random = any(word in name for word in _RANDOM) and "generator" in names

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if name in _REFUSED:
            raise NotImplementedError(f"aten::{name} is not emulated on the simulated NPU")
        values = [*args, *kwargs.values()]
        device = device_of(name, values) or kwargs.get("device")
        if device is None or device.index is None:
            device = torch.device("npu", torch_npu.npu.current_device())
        if name == "copy_":
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            _note_copy(args[0], args[1], non_blocking)
            if streams.delayed(args[0], args[1], non_blocking):
                return args[0]
        aicpu.check(name, args, kwargs)
        streams.catch_up()
        if is_random:
            kwargs["generator"] = generator(device, kwargs.get("generator"))
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        outputs = [args[i] if i < len(args) else kwargs.get(names[i]) for i in written]
        host_args, host_kwargs = tree_map(_on_host, args), tree_map(_on_host, kwargs)
        with torch.no_grad():
            result = compute(*host_args, **host_kwargs)
        if outputs and schema.returns and all(r.alias_info for r in schema.returns):
            for place, out in zip(written, outputs, strict=True):
                computed = host_args[place] if place < len(host_args) else host_kwargs.get(names[place])
                if isinstance(out, torch.Tensor) and computed.shape != out.shape:  # out= was resized
                    out.resize_(computed.shape)
                    host(out).copy_(computed)
            streams.used(values)
            return outputs[0] if len(schema.returns) == 1 else tuple(outputs)
        made = tree_map(lambda value: to_device(value, device), result)
        streams.used((values, made))
        return made

    return kernel


def install() -> None:
    """Put the host's computation under every aten operation that torch_npu has a kernel for."""
    torch.empty(1, device="npu:0")
    streams.install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of overriding a kernel, which is what this does
        for full in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
            namespace, _, name = full.partition("::")
            packet, _, overload = name.partition(".")
            if namespace != "aten" or name in (*_TORCH_NPU.split(), *ELSEWHERE) or not hasattr(torch.ops.aten, packet):
                continue
            operation = getattr(getattr(torch.ops.aten, packet), overload or "default", None)
            if operation is not None and not operation.is_view:  # torch_npu's own views share memory
                _library.impl(name, _emulated(operation, name), "PrivateUse1", allow_override=True)
