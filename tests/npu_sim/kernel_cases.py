"""Kernels of the simulated NPU beside the reference, for worlds of simulated NPUs."""

from __future__ import annotations

import types
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qwen3_npu import kernels
from qwen3_npu.distributed.launch import World
from qwen3_npu.kernels import reference
from qwen3_npu.platform.base import Platform
from qwen3_npu.watch import here


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _difference(kernel: Callable, definition: Callable, *tensors: torch.Tensor, **options: Any) -> float:
    """Largest difference of values and gradients between the device's kernel and the reference on the host."""
    results = []
    for function, device in ((kernel, "npu"), (definition, "cpu")):
        inputs = [t.to(device).detach().requires_grad_(t.is_floating_point()) for t in tensors]
        out = function(*inputs, **options)
        (out * _randn(*out.shape, seed=7).to(device)).sum().backward()
        results.append([out, *(t.grad for t in inputs if t.is_floating_point())])
    pairs = [(got.cpu(), expected) for got, expected in zip(*results, strict=True)]
    assert all(got.shape == expected.shape for got, expected in pairs)
    return max((got - expected).abs().max().item() for got, expected in pairs if got.numel())


def _block_difference(npu: Any, cu_seqlens: list[int] | None) -> float:
    q, k, v = _randn(20, 1, 4, 16), _randn(20, 1, 2, 16, seed=1), _randn(20, 1, 2, 16, seed=2)
    grad, options = _randn(20, 1, 4, 16, seed=3), {"scale": 0.25, "cu_seqlens": cu_seqlens}
    expected = reference.attention_block(q, k, v, **options)
    got = npu.attention_block(q.npu(), k.npu(), v.npu(), **options)
    merged = {"out": expected[0], "lse": expected[1] + 0.3}  # as if other blocks had been merged
    on_device = {name: x.npu() for name, x in merged.items()}
    expected += reference.attention_block_backward(grad, q, k, v, **merged, **options)
    got += npu.attention_block_backward(grad.npu(), q.npu(), k.npu(), v.npu(), **on_device, **options)
    return max((a.cpu() - b).abs().max().item() for a, b in zip(got, expected, strict=True))


def _bf16_block_difference(npu: Any) -> float:
    """A block of 16 bits whose merged output and gradient are float32, as ring attention has them."""
    q, k, v = (_randn(20, 1, n, 16, seed=n).bfloat16() for n in (4, 2, 2))
    options: dict[str, Any] = {"scale": 0.25, "cu_seqlens": None}
    out, lse = reference.attention_block(q, k, v, **options)
    saved = _randn(20, 1, 4, 16, seed=3), q, k, v
    got = npu.attention_block_backward(*(x.npu() for x in saved), out=out.float().npu(), lse=lse.npu(), **options)
    expected = reference.attention_block_backward(*saved, out=out.float(), lse=lse, **options)
    assert all(x.dtype == torch.bfloat16 for x in got)
    return max((a.cpu().float() - b.float()).abs().max().item() for a, b in zip(got, expected, strict=True))


def _dropout_difference(npu: Any, cu_seqlens: list[int] | None) -> float:
    """Attention is linear in the values, with dropout, too: grad of v times v is grad of the output times the output.

    And half of the weights, dropped, change the output.
    """
    q, k = (_randn(40, 1, 4, 16, seed=n).npu() for n in (0, 1))
    v = _randn(40, 1, 4, 16, seed=2).npu().requires_grad_()
    torch.npu.manual_seed(5)
    out, whole = (npu.attention(q, k, v, scale=0.25, cu_seqlens=cu_seqlens, dropout=p) for p in (0.5, 0.0))
    grad = _randn(40, 1, 4, 16, seed=7).npu()
    (d_v,) = torch.autograd.grad(out, v, grad)
    share = ((out - whole).abs().mean() / whole.abs().mean()).item()
    assert 0.1 < share < 3, f"dropout changes the output by {share:.3f} of it"
    return abs((d_v * v).sum().item() - (grad * out).sum().item()) / (grad * out).abs().sum().item()


def _decode_difference(npu: Any, queries: int) -> float:
    q, k, v = (x.bfloat16() for x in (_randn(queries, 2, 4, 16), _randn(9, 2, 2, 16), _randn(9, 2, 2, 16, seed=1)))
    with torch.no_grad():
        got = npu.attention(q.npu(), k.npu(), v.npu(), scale=0.25).cpu()
        exact = reference.attention(q.float(), k.float(), v.float(), scale=0.25)
    assert got.dtype == torch.bfloat16
    return (got.float() - exact).abs().max().item()


def _cache_difference(npu: Any, lengths: list[int] | None) -> float:
    """One new token of each of two sequences against a part of their cache."""
    q, k, v = (x.bfloat16() for x in (_randn(2, 4, 16), _randn(2, 2, 9, 16), _randn(2, 2, 9, 16, seed=1)))
    ends = lengths or [7, 7]
    visible = None if lengths is None else torch.arange(7) < torch.tensor(lengths)[:, None]
    got = npu.decode_attention(q.npu(), k.npu(), v.npu(), None, lengths=ends, scale=0.25).cpu()
    exact = reference.decode_attention(q.float(), k.float(), v.float(), visible, lengths=ends, scale=0.25)
    return (got.float() - exact).abs().max().item()


def _grouped_difference(module: Any, counts: list[int]) -> float:
    """Counts on the device, as the dispatcher of experts leaves them."""
    products = module.grouped_matmul(torch.tensor(counts).npu()), reference.grouped_matmul(torch.tensor(counts))
    return _difference(*products, _randn(sum(counts), 8), _randn(len(counts), 8, 6))


def _rotary(module: Any) -> Callable:
    angles = _randn(17, 1, 1, 8)
    angles = torch.cat((angles, angles), -1)
    return lambda x: module.rotary(x, angles.cos().to(x.device), angles.sin().to(x.device))


def _there_and_back(module: Any) -> Callable:
    """Copy tokens to their experts, treat each copy differently, add up."""

    def function(tokens: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        chosen = probs.detach().topk(2).indices
        routing_map = torch.zeros(probs.shape, dtype=torch.bool, device=tokens.device).scatter(1, chosen, True)
        rows, weights, indices = module.permute(tokens, routing_map, probs, 2 * len(tokens))
        factor = torch.arange(len(rows), device=tokens.device)[:, None]
        return module.unpermute(rows * weights[:, None] * factor, indices, len(tokens))

    return function


def _old_permute_difference(npu: Any) -> float:
    """Router weights in float32 beside tokens of 16 bits, which torch_npu 2.7's operation refuses."""
    import torch_npu

    tokens, routing_map = _randn(4, 8).bfloat16(), torch.eye(4, dtype=torch.bool)
    probs = torch.full((4, 4), 0.3)
    with unittest.mock.patch.object(torch_npu, "__version__", "2.7.1.post2"):
        rows, weights, _ = npu.permute(tokens.npu(), routing_map.npu(), probs.npu(), 4)
    assert weights.dtype == torch.bfloat16
    return max((rows.cpu() - tokens).abs().max().item(), (weights.cpu() - probs[0].bfloat16()).abs().max().item())


def _both(add_rms_norm: Callable) -> Callable:
    """Both results as one tensor."""
    return lambda *inputs, eps: torch.cat(add_rms_norm(*inputs, eps))


def _gradient_difference(npu: Any, dtype: torch.dtype) -> float:
    """Of a sum that is not 0 before; products of 16-bit numbers are not rounded before they are added to it."""
    x, grad, total = _randn(20, 6).to(dtype), _randn(20, 8).to(dtype), _randn(8, 6)
    got = total.npu()
    npu.add_weight_gradient(x.npu(), grad.npu(), got)
    return (got.cpu() - (total + grad.float().t() @ x.float())).abs().max().item()


def _norm_sum_difference(npu: Any) -> float:
    """What a norm leaves to megatron where the weight has a sum of its gradients: nothing, it is in the sum."""
    x, total = _randn(5, 16).bfloat16(), _randn(16)
    weight = torch.nn.Parameter(torch.ones(16, dtype=torch.bfloat16, device="npu"))
    weight.main_grad, weight.grad_added_to_main_grad = total.npu(), False
    npu.rms_norm(x.npu(), weight, 1e-6).sum().backward()
    expected = total + torch.nn.functional.rms_norm(x.float(), (16,)).sum(0)
    assert weight.grad_added_to_main_grad
    return (weight.main_grad.cpu() - expected).abs().max().item()


def _grouped_sum_difference(npu: Any) -> float:
    """The same of experts' weights, which are handed over as a view."""
    counts, x, total = torch.tensor([3, 0, 4, 2]), _randn(9, 8).bfloat16(), _randn(8, 24)
    weight = torch.nn.Parameter(_randn(8, 24, seed=5).bfloat16().npu())
    weight.main_grad, weight.grad_added_to_main_grad = total.npu(), False
    npu.grouped_matmul(counts.npu())(x.npu(), weight.view(4, 8, 6)).sum().backward()
    rows = torch.stack([part.float().sum(0) for part in x.split(counts.tolist())])
    assert weight.grad_added_to_main_grad
    expected = total + rows.unsqueeze(-1).expand(4, 8, 6).reshape(8, 24)
    return (weight.main_grad.cpu() - expected).abs().max().item()


def _measurements(npu: Any) -> dict[str, Callable[[], float]]:
    q, k, v = _randn(17, 2, 4, 16), _randn(17, 2, 2, 16, seed=1), _randn(17, 2, 2, 16, seed=2)
    packed = _randn(20, 1, 4, 16), _randn(20, 1, 2, 16, seed=1), _randn(20, 1, 2, 16, seed=2)
    attention = npu.attention, reference.attention
    return {
        "attention": lambda: _difference(*attention, q, k, v, scale=0.25),
        "attention, last positions": lambda: _difference(*attention, q[-5:], k, v, scale=0.25),
        "attention, packed": lambda: _difference(*attention, *packed, scale=0.25, cu_seqlens=[0, 7, 13, 20]),
        "attention, one document": lambda: _difference(*attention, *packed, scale=0.25, cu_seqlens=[0, 20]),
        "attention block, full": lambda: _block_difference(npu, None),
        "attention block, causal": lambda: _block_difference(npu, [0, 20]),
        "attention block, packed": lambda: _block_difference(npu, [0, 7, 13, 20]),
        "attention, dropout": lambda: _dropout_difference(npu, None),
        "attention, packed, dropout": lambda: _dropout_difference(npu, [0, 7, 13, 40]),
        "attention block, 16 bits": lambda: _bf16_block_difference(npu),
        "decode, one query": lambda: _decode_difference(npu, 1),
        "decode, three queries": lambda: _decode_difference(npu, 3),
        "decode from a cache": lambda: _cache_difference(npu, None),
        "decode from a cache, lengths": lambda: _cache_difference(npu, [7, 3]),
        "rms_norm": lambda: _difference(npu.rms_norm, reference.rms_norm, q, 1 + _randn(16), eps=1e-6),
        "rms_norm, another epsilon": lambda: _difference(npu.rms_norm, reference.rms_norm, q, 1 + _randn(16), eps=1e-2),
        "rms_norm, into the sum": lambda: _norm_sum_difference(npu),
        "add_rms_norm": lambda: _difference(
            _both(npu.add_rms_norm),
            _both(reference.add_rms_norm),
            q,
            _randn(17, 2, 4, 16, seed=4),
            1 + _randn(16),
            eps=1e-2,
        ),
        "add_weight_gradient": lambda: _gradient_difference(npu, torch.float32),
        "add_weight_gradient, bf16": lambda: _gradient_difference(npu, torch.bfloat16),
        "rotary": lambda: _difference(_rotary(npu), _rotary(reference), q),
        "swiglu": lambda: _difference(npu.swiglu, reference.swiglu, q),
        "grouped_matmul": lambda: _grouped_difference(npu, [3, 0, 4, 2]),
        "grouped_matmul, no rows": lambda: _grouped_difference(npu, [0, 0, 0, 0]),
        "permute, torch_npu 2.7": lambda: _old_permute_difference(npu),
        "grouped_matmul, into the sum": lambda: _grouped_sum_difference(npu),
        "attention, one row": lambda: _difference(*attention, *(x[:, :1] for x in (q, k, v)), scale=0.25),
        "permute and unpermute": lambda: _difference(
            _there_and_back(npu), _there_and_back(reference), _randn(9, 8), _randn(9, 4).softmax(-1)
        ),
    }


def _changed(modules: tuple[types.ModuleType, types.ModuleType], old: str, new: str) -> types.ModuleType:
    """kernels/npu.py as it were if a piece of it, or of npu_gradients.py, read otherwise."""
    sources = [Path(str(module.__file__)).read_text() for module in modules]
    found = [source.count(old) for source in sources]
    assert sorted(found) == [0, 1], f"{old!r} is {found} times in {modules}"
    changed = types.ModuleType("changed")
    for source in sources:  # both become one module, of which the first takes the second to be
        exec(compile(source.replace(old, new), "changed", "exec"), changed.__dict__)
    vars(changed)["npu_gradients"] = changed
    return changed


def kernel_differences(
    platform: Platform, world: World, change: tuple[str, str] | None = None
) -> dict[str, float | str]:
    """Each kernel against the reference: the largest difference, or what was raised.

    Args:
        change: a piece of the kernels' text and what to put in its place, first.
    """
    from qwen3_npu.kernels import npu, npu_gradients

    here.at("other")  # a step may have been the last thing here
    if change is not None:
        npu = _changed((npu, npu_gradients), *change)
    npu._compressed_mask.cache_clear()
    with torch.inference_mode():  # what is made here once serves training, too
        npu._compressed_mask(world.device)
    results: dict[str, float | str] = {}
    for name, measure in _measurements(npu).items():
        try:
            results[name] = measure()
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            results[name] = (str(error) or repr(error)).splitlines()[0]
    return results


def mindspeed_differences(platform: Platform, world: World) -> dict[str, float]:
    """What `--kernels mindspeed` takes from MindSpeed against the reference, with stand-ins for its operators."""
    import mindspeed_ops

    mindspeed_ops.install()
    chosen = kernels.select_kernels("mindspeed", "npu")
    assert chosen.rotary.__module__.endswith(".mindspeed")
    assert chosen.grouped_matmul.__module__.endswith(".mindspeed")
    return {
        "rotary": _difference(_rotary(chosen), _rotary(reference), _randn(17, 2, 4, 16)),
        "grouped_matmul": _grouped_difference(chosen, [3, 0, 4, 2]),
        "grouped_matmul, no rows": _grouped_difference(chosen, [0, 0, 0, 0]),
        "grouped_matmul, one expert": _grouped_difference(chosen, [9]),
    }
