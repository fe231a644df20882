"""Rates on the device, for `benchmarks/gpu.py`: its ceilings, each kernel, and what else could be chosen."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_kernels import Case, Sizes, cases
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen3_npu import kernels

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def milliseconds(function: Callable[[], Any], clear: list[torch.Tensor] | None = None) -> float:
    """Median time of a call on the device, its inputs out of the cache; on the CPU one call."""
    if not torch.cuda.is_available():
        import time

        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3
    from triton.testing import do_bench

    return do_bench(function, warmup=5, rep=40, grad_to_none=clear, return_mode="median")


def ceilings(device: str, size: int) -> dict[str, float]:
    """Bytes and floating point operations per second that can be had, of random data."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = milliseconds(lambda: a @ b)
    source = torch.randn(size * size * 4, device=device)
    target = torch.empty_like(source)
    copied = milliseconds(lambda: target.copy_(source))
    return {"tflops": 2 * size**3 / product / 1e9, "tb_per_s": 2 * source.nbytes / copied / 1e9}


def timed(call: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> dict[str, float]:
    """Forward, and forward with backward."""
    forward = milliseconds(lambda: call(*inputs))
    out = call(*inputs)
    grad = torch.randn_like(out)
    back = milliseconds(lambda: torch.autograd.backward(out, grad, retain_graph=True), inputs)
    return {"forward_ms": forward, "backward_ms": back}


def rates(device: str, sizes: Sizes, record: Callable[[str, Any], None]) -> None:
    """Ceilings first; then each operation beside its floor and beside torch's own kernels, then alternatives."""
    most = ceilings(device, min(8192, sizes.hidden * 2))
    record("ceilings", most)
    for case in cases(sizes, device):
        inputs = [x.to(torch.bfloat16).requires_grad_() for x in case.tensors()]
        found: dict[str, Any] = {"floor_ms": _floor(case, most)}
        for name in ("auto", "torch"):
            try:
                found[name] = timed(functools.partial(case.call, kernels.select_kernels(name, device)), inputs)
            except Exception as error:
                found[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        record(f"time {case.name}", found)
    for name, measure in (("attention", _attentions), ("linears", _linears), ("sums", _sums)):
        try:
            record(f"time {name}, alternatives", measure(device, sizes))
        except Exception as error:
            record(f"time {name}, alternatives", {"failed": f"{type(error).__name__}: {error}"[:600]})


def _floor(case: Case, most: dict[str, float]) -> float:
    return max(case.bytes / most["tb_per_s"], case.flops / most["tflops"]) / 1e9


def _attentions(device: str, s: Sizes) -> dict[str, Any]:
    """One causal document by each of torch's kernels."""
    found: dict[str, Any] = {}
    shapes = (s.heads, s.groups, s.groups)
    inputs = [torch.randn(1, n, s.tokens, s.head, device=device, dtype=torch.bfloat16) for n in shapes]
    inputs = [x.requires_grad_() for x in inputs]
    for name, backend in BACKENDS.items():
        if device == "cpu":
            continue
        with sdpa_kernel(backend):
            call = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
            try:
                found[name] = timed(call, inputs)
            except RuntimeError as error:
                found[name] = {"failed": str(error)[:300]}
    return found


def _linears(device: str, s: Sizes) -> dict[str, Any]:
    """The layer's linears: forward, both gradients, and the weight's gradient added to a float32 sum in one product."""
    found: dict[str, Any] = {}
    query, key = s.heads * s.head, s.groups * s.head
    for name, wide, narrow in (
        ("qkv", query + 2 * key, s.hidden),
        ("proj", s.hidden, query),
        ("fc1", 2 * s.ffn, s.hidden),
        ("fc2", s.hidden, s.ffn),
    ):
        x, w, g = (
            torch.randn(*shape, device=device, dtype=torch.bfloat16)
            for shape in ((s.tokens, narrow), (wide, narrow), (s.tokens, wide))
        )
        total = torch.zeros(wide, narrow, device=device)
        times = {
            "forward": milliseconds(functools.partial(F.linear, x, w)),
            "dx": milliseconds(functools.partial(torch.mm, g, w)),
            "dw": milliseconds(functools.partial(torch.mm, g.t(), x)),
            "dw and sum": milliseconds(functools.partial(_plain_sum, total, g, x)),
        }
        if device != "cpu":
            times["dw and sum, fused"] = milliseconds(functools.partial(_fused_sum, total, g, x))
        found[name] = {"ms": times, "tflops": 2 * s.tokens * wide * narrow / times["forward"] / 1e9}
    return found


def _plain_sum(total: torch.Tensor, g: torch.Tensor, x: torch.Tensor) -> None:
    total.add_(torch.mm(g.t(), x))


def _fused_sum(total: torch.Tensor, g: torch.Tensor, x: torch.Tensor) -> None:
    torch.addmm(total, g.t(), x, out_dtype=torch.float32, out=total)


def _sums(device: str, s: Sizes) -> dict[str, float]:
    """Milliseconds of 10^6 parameters for what a step does beside its products."""
    parameter = torch.randn(s.hidden, s.ffn, device=device, requires_grad=True)
    parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW([parameter], lr=1e-4, fused=True)
    half = parameter.detach().bfloat16()
    times = {
        "adamw": milliseconds(optimizer.step),
        "norm": milliseconds(lambda: torch._foreach_norm([parameter.grad])),
        "clip": milliseconds(lambda: torch._foreach_mul_([parameter.grad], 0.5)),
        "zero": milliseconds(parameter.grad.zero_),
        "add": milliseconds(lambda: parameter.grad.add_(half)),
        "copy": milliseconds(lambda: half.copy_(parameter.detach())),
    }
    return {name: value / parameter.numel() * 1e6 for name, value in times.items()}
