"""torch_npu's own operations on the simulated device.

Each call first runs torch_npu's real host code, with all of its checks, up to where it hands over to the kernel; then
the result is computed here. Gradients stay torch_npu's: its autograd nodes call the gradient operations below.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch_npu
from torch.utils._pytree import tree_map

from sim import attention, dropout, hccl, streams
from sim.attention import only_defaults, require
from sim.device import ELSEWHERE, device_of, generator, host, to_device

# The status with which stub_cann/runtime.c answers where the kernel would start.
_KERNEL_NOT_HERE = "error code is 361001"
_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
_libraries = {namespace: torch.library.Library(namespace, "IMPL") for namespace in ("npu", "aten")}
# What draws dropout's mask, which torch_npu's host code asks for first.
_MASK = "aclnnDropoutGenMask"
CALLS: dict[str, int] = {}


@contextlib.contextmanager
def differentiated() -> Iterator[None]:
    """Autograd on the host, also below a TorchDispatchMode, which has switched it off here."""
    off = torch._C._dispatch_tls_local_exclude_set() - torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)
    off = off - torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), off), torch.enable_grad():
        yield


def _emulate(name: str, compute: Callable) -> None:
    namespace = "aten" if name in ELSEWHERE else "npu"
    operation = getattr(getattr(torch.ops, namespace), name).default
    arguments = operation._schema.arguments
    names = [argument.name for argument in arguments]
    positional = [a.name for a in arguments if not a.kwarg_only and not a.has_default_value()]
    real = torch.library.get_kernel(operation, "PrivateUse1")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        CALLS[name] = CALLS.get(name, 0) + 1
        streams.catch_up()
        given = dict(zip(names, args, strict=False)) | kwargs
        drops = 0.0 < given.get("keep_prob", 1.0) < 1.0
        draws = name == "native_dropout" or (drops and not name.endswith("_grad"))
        device = device_of(name, [*args, *kwargs.values()])
        # Where a mask is drawn, that kernel is asked for first, and no other: with what is not dropped they are.
        for checked in (given, given | {"keep_prob": 1.0}) if drops else (given,):
            try:
                positions = [checked[n] for n in names[: len(args)]]
                result = real.call_boxed(_KEYS, *positions, **{n: checked[n] for n in kwargs})
            except RuntimeError as error:
                if _KERNEL_NOT_HERE not in str(error):
                    raise
                require(not draws or checked is not given or _MASK in str(error), f"{name} drew no mask: {error}")
            else:
                if compute is _cast:  # to the type that it has
                    return result
                raise RuntimeError(f"{name}: torch_npu did not ask for a kernel")
        values = tree_map(lambda value: host(value) if isinstance(value, torch.Tensor) else value, given)
        if draws:
            values["seed"] = generator(device, None).initial_seed() % 2**31
        with torch.no_grad():
            result = compute(*[values.pop(n) for n in positional], **values)
        if name.endswith("_"):  # in place
            streams.used(given.values())
            return args[0]
        made = tree_map(lambda v: to_device(v.contiguous() if isinstance(v, torch.Tensor) else v, device), result)
        streams.used((*given.values(), made))
        return made

    _libraries[namespace].impl(name, kernel, "PrivateUse1", allow_override=True)


def _rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    require(gamma.dtype == x.dtype and gamma.shape == x.shape[-1:], f"gamma {gamma.dtype} {tuple(gamma.shape)}")
    rstd = (x.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (x.float() * rstd * gamma.float()).to(x.dtype), rstd


def _rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, gamma: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    normed, dn = x.float() * rstd, dy.float() * gamma.float()
    dx = rstd * (dn - normed * (dn * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * normed).flatten(0, -2).sum(0)  # the gradient of gamma is float32


def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    require(x.dtype == residual.dtype and x.shape == residual.shape, f"x1 {x.dtype}, x2 {residual.dtype}")
    total = x + residual
    return *_rms_norm(total, gamma, epsilon), total


def _rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary_mode: str = "half", **given: Any) -> Any:
    only_defaults(given, {"rotate": None})
    require(rotary_mode == "half", f"rotary_mode {rotary_mode} is not emulated")
    s, b, _, d = x.shape
    for table in (cos, sin):
        shapes = ((s, 1, 1, d), (s, b, 1, d))
        require(table.dim() == 4 and tuple(table.shape) in shapes, f"SBND {tuple(x.shape)} with {tuple(table.shape)}")
    require(d % 2 == 0 and d < 896 and b < 1000 and x.shape[2] < 1000, f"sizes {tuple(x.shape)}")
    first, second = x.float().chunk(2, -1)
    cos, sin = cos.to(x.dtype).float(), sin.to(x.dtype).float()
    return (x.float() * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


def _rotary_backward(
    grad: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary_mode: str = "half"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with differentiated():
        inputs = [t.detach().requires_grad_() for t in (x, cos, sin)]
        return torch.autograd.grad(_rotary(*inputs, rotary_mode), inputs, grad)


def _swiglu(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    require(x.shape[dim] % 2 == 0, f"swiglu halves {x.shape[dim]}")
    gate, up = x.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def _swiglu_backward(grad: torch.Tensor, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    with differentiated():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(_swiglu(leaf, dim), leaf, grad)[0]


def _grouped_matmul(x: list[torch.Tensor], weight: list[torch.Tensor], **given: Any) -> list[torch.Tensor]:
    ends, kind = given.pop("group_list"), given.pop("group_type")
    require(given.pop("split_item") in (2, 3), "one output needs split_item 2 or 3")
    require(given.pop("group_list_type", 0) == 0, "only cumulative group_list is emulated")
    if unknown := [
        name for name, value in given.items() if value is not None and not (name == "act_type" and value == 0)
    ]:
        raise NotImplementedError(f"{unknown} are not emulated")
    require(len(x) == len(weight) == 1, "one x and one weight are emulated")
    x, weight = x[0], weight[0]
    require(x.dtype == weight.dtype, f"x is {x.dtype}, weight {weight.dtype}")
    require(isinstance(ends, torch.Tensor) and ends.dtype == torch.int64, "group_list is an int64 tensor")
    bounds = ends.tolist()
    rows = x.shape[0] if kind == 0 else x.shape[1]
    require(bounds == sorted(bounds) and bounds[0] >= 0 and bounds[-1] == rows, f"group_list {bounds} of {rows} rows")
    ranges = list(zip([0, *bounds[:-1]], bounds, strict=True))
    if kind == 0:
        require(weight.dim() == 3 and len(weight) == len(bounds), "m groups: weight is [groups, k, n]")
        return [torch.cat([x[a:b] @ matrix for (a, b), matrix in zip(ranges, weight, strict=True)])]
    require(kind == 2 and weight.dim() == 2, f"group_type {kind} is not emulated")
    return [torch.stack([x[:, a:b] @ weight[a:b] for a, b in ranges])]


def _grouped_matmul_add(
    total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, group_list: torch.Tensor, **given: Any
) -> torch.Tensor:
    only_defaults(given, {"transpose_x": True, "transpose_weight": False, "group_type": 2, "group_list_type": 0})
    require(total.dtype == torch.float32, f"self is float32, not {total.dtype}")
    require(x.dtype == weight.dtype and x.dtype in (torch.float16, torch.bfloat16), f"{x.dtype}, {weight.dtype}")
    require(group_list.dtype == torch.int64, "group_list is an int64 tensor")
    bounds = group_list.tolist()
    require(bounds == sorted(bounds) and bounds[0] >= 0 and bounds[-1] == len(x) == len(weight), f"rows {bounds}")
    require(total.shape == (len(bounds), x.shape[1], weight.shape[1]), f"self is {tuple(total.shape)}")
    for group, (a, b) in enumerate(zip([0, *bounds[:-1]], bounds, strict=True)):
        total[group].addmm_(x[a:b].float().t(), weight[a:b].float())
    return total


def _positions(routing_map: torch.Tensor) -> torch.Tensor:
    """Where token t's j-th expert's copy lies among all copies sorted by expert, then token: [tokens, topk]."""
    order = routing_map.t().reshape(-1).long().cumsum(0).sub(1).view(routing_map.shape[1], -1).t()
    return order.masked_select(routing_map).view(len(routing_map), -1)


def _permute(tokens: torch.Tensor, routing_map: torch.Tensor, **given: Any) -> tuple[torch.Tensor, ...]:
    only_defaults(given, {"drop_and_pad": False})
    probs, rows = given.get("probs"), given.get("num_out_tokens")
    require(routing_map.dtype in (torch.bool, torch.int8), f"routing_map is {routing_map.dtype}")
    per_token = set(routing_map.sum(1).tolist())
    require(
        per_token == {rows // len(tokens)}, f"every token needs {rows / len(tokens)} experts, they have {per_token}"
    )
    positions = _positions(routing_map.bool())
    permuted = tokens.new_empty(rows, tokens.shape[1])
    permuted[positions.flatten()] = tokens.repeat_interleave(positions.shape[1], 0)
    weights = torch.empty(0)
    if probs is not None:
        mixed = probs.dtype == torch.float32 and tokens.dtype == torch.bfloat16
        mixed = mixed and not torch_npu.__version__.startswith("2.7.")  # its documentation does not allow it
        require(probs.dtype == tokens.dtype or mixed, f"probs {probs.dtype} with tokens {tokens.dtype}")
        weights = probs.t().masked_select(routing_map.bool().t())
    return permuted, weights, positions.flatten().int()


def _permute_grad(
    grad: torch.Tensor,
    probs_grad: torch.Tensor | None,
    indices: torch.Tensor,
    routing_map: torch.Tensor,
    experts: int,
    tokens: int,
    drop_and_pad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    require(not drop_and_pad, "drop_and_pad is not emulated")
    d_tokens = grad[indices.long()].view(tokens, -1, grad.shape[1]).float().sum(1).to(grad.dtype)
    d_probs = torch.empty(0)
    if probs_grad is not None:
        d_probs = probs_grad.new_zeros(experts, tokens).masked_scatter(routing_map.bool().t(), probs_grad).t()
    return d_tokens, d_probs


def _unpermute(
    rows: torch.Tensor, indices: torch.Tensor, shape: list[int], **given: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    only_defaults(given, {"probs": None, "routing_map": None, "drop_and_pad": False})
    require(indices.dtype == torch.int32 and len(indices) == len(rows), "sorted_indices: int32, one per row")
    out = rows[indices.long()].view(shape[0], -1, shape[1]).float().sum(1).to(rows.dtype)
    return out, indices.clone(), torch.empty_like(indices), torch.empty(0)


def _unpermute_grad(
    grad: torch.Tensor,
    out_index: torch.Tensor,
    token_id: torch.Tensor,
    routing_map: None,
    rows: torch.Tensor | None,
    probs: None,
    drop_and_pad: bool,
    shape: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    require(probs is None and not drop_and_pad, "probs and drop_and_pad are not emulated")
    d_rows = grad.new_empty(len(out_index), shape[1])
    d_rows[out_index.long()] = grad.repeat_interleave(len(out_index) // shape[0], 0)
    return d_rows, torch.empty(0)


def _check_fused(x: torch.Tensor, weight: torch.Tensor, ranks: int, given: dict[str, Any]) -> None:
    """What the documentation of the operations that communicate asks for."""
    only_defaults(given, {"reduce_op": "sum", "gather_index": 0, "comm_turn": 0})
    unused = ("bias", "x1_scale", "x2_scale", "output_dtype", "comm_mode")
    only_defaults(given, dict.fromkeys(unused))
    require(x.dtype == weight.dtype and x.dtype in (torch.float16, torch.bfloat16), f"{x.dtype}, {weight.dtype}")
    require(x.dim() == weight.dim() == 2 and x.is_contiguous(), "input is a plain matrix, not a turned one")
    require(x.shape[1] == weight.shape[0] and 256 <= x.shape[1] < 65535, f"k is {x.shape[1]}, {weight.shape[0]}")
    require(ranks in (2, 4, 8, 16), f"world_size {ranks}")


def _gather_product(
    x: torch.Tensor, weight: torch.Tensor, hcom: str, world_size: int, gather_output: bool = True, **given: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_fused(x, weight, world_size, given)
    whole = x.new_empty(world_size * x.shape[0], x.shape[1])
    hccl.group_named(hcom)._allgather_base(whole, x).wait()
    return whole @ weight, whole if gather_output else x.new_empty(0)


def _product_scatter(x: torch.Tensor, weight: torch.Tensor, hcom: str, world_size: int, **given: Any) -> torch.Tensor:
    _check_fused(x, weight, world_size, given)
    require(x.shape[0] % world_size == 0, f"{x.shape[0]} rows for {world_size} ranks")
    product = x @ weight
    part = product.new_empty(len(product) // world_size, product.shape[1])
    hccl.group_named(hcom)._reduce_scatter_base(part, product, dist.ReduceScatterOptions()).wait()  # the sum
    return part


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype)


_OPERATIONS: dict[str, Callable] = {
    "_npu_dtype_cast": _cast,
    "_npu_dtype_cast_backward": _cast,
    "npu_all_gather_base_mm": _gather_product,
    "npu_mm_reduce_scatter_base": _product_scatter,
    "npu_fusion_attention": attention.forward,
    "npu_fusion_attention_grad": attention.backward,
    "npu_fused_infer_attention_score": attention.infer,
    "npu_rms_norm": _rms_norm,
    "npu_add_rms_norm": _add_rms_norm,
    "npu_rms_norm_backward": _rms_norm_backward,
    "npu_rotary_mul": _rotary,
    "npu_rotary_mul_backward": _rotary_backward,
    "npu_swiglu": _swiglu,
    "npu_swiglu_backward": _swiglu_backward,
    "npu_grouped_matmul": _grouped_matmul,
    "npu_grouped_matmul_add_": _grouped_matmul_add,
    "npu_moe_token_permute_with_routing_map": _permute,
    "npu_moe_token_permute_with_routing_map_grad": _permute_grad,
    "_npu_moe_token_unpermute_with_routing_map": _unpermute,
    "npu_moe_token_unpermute_with_routing_map_grad": _unpermute_grad,
    "native_dropout": dropout.forward,
    "native_dropout_backward": dropout.backward,
}


def install() -> None:
    """Put these under torch_npu's operations."""
    for name, compute in _OPERATIONS.items():
        _emulate(name, compute)
