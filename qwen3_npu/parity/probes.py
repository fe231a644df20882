"""Probe operators that a training on one process does not call: attention's blocks, decoding, dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from qwen3_npu.kernels import Kernels
from qwen3_npu.training.fingerprints.recorder import Noted, StepRecorder
from qwen3_npu.training.fingerprints.sketch import NUMBERS, sketch

_SCALE, _DROPOUT = 0.25, 0.5
_SPREAD = 0.05  # share by which an output with dropout differs between random choices


def _random(seed: int, shape: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def probe(kernels: Kernels, device: torch.device, dtype: str) -> Noted:
    """The records of these operators."""
    recorder = StepRecorder(lambda step: True, lambda step, noted: None, exact=True)
    wrapped = recorder.wrapped(kernels)
    recorder.begin(1)
    recorder.is_live, recorder.micro_batch = True, 1
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    q, k, v = (_random(n, (24, 1, heads, 16)).to(device, kind) for n, heads in enumerate((4, 2, 2)))
    calls: list[Callable[[], object]] = [
        lambda: wrapped.attention(q[-5:], k, v, scale=_SCALE),
        lambda: wrapped.attention(q[-1:], k, v, scale=_SCALE),
        lambda: wrapped.decode_attention(*_cache(device, kind), lengths=[7, 3], scale=_SCALE),
        *(lambda ends=ends: _block(wrapped, (q, k, v), ends) for ends in (None, (0, 24), (0, 9, 15, 24))),
    ]
    try:
        for call in calls:
            with torch.no_grad():
                call()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return recorder.take(error)
    noted = recorder.take()
    q, k, v = (_random(n, (64, 1, heads, 16)).to(device, kind) for n, heads in enumerate((4, 2, 2)))
    return _with_dropout(noted, kernels, q, k, v=v)


def _cache(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    q, k, v = (
        _random(n, shape).to(device, dtype) for n, shape in enumerate(((2, 4, 16), (2, 2, 9, 16), (2, 2, 9, 16)), 5)
    )
    return q, k, v, (torch.arange(7) < torch.tensor([7, 3])[:, None]).to(device)


def _block(kernels: Kernels, qkv: tuple[torch.Tensor, ...], ends: tuple[int, ...] | None) -> None:
    """A block and its gradients, of a merged output in float32 as the ring has it."""
    out, lse = kernels.attention_block(*qkv, scale=_SCALE, cu_seqlens=ends)
    grad = _random(9, out.shape).to(out.device)
    kernels.attention_block_backward(grad.to(out.dtype), *qkv, out=out, lse=lse + 0.25, scale=_SCALE, cu_seqlens=ends)


def _with_dropout(noted: Noted, kernels: Kernels, q: torch.Tensor, k: torch.Tensor, *, v: torch.Tensor) -> Noted:
    """And by how much dropout moves an output: its square is, expected, p / (1 - p) times the sum of (w v)^2."""
    with torch.no_grad():
        dropped = kernels.attention(q, k, v, scale=_SCALE, dropout=_DROPOUT).cpu().double()
        q, k, v = (x.cpu().double() for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
        visible = torch.ones(len(q), len(k), dtype=torch.bool).tril()
        scores = torch.einsum("sbnd,tbnd->bnst", q, k) * _SCALE
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        moved = (dropped - torch.einsum("bnst,tbnd->sbnd", weights, v)).square().sum()
        expected = _DROPOUT / (1 - _DROPOUT) * torch.einsum("bnst,tbnd->sbnd", weights.square(), v.square()).sum()
    error = abs((moved / expected).sqrt().item() - 1)
    row = np.append(sketch(expected.float().view(1)).numpy(), (error, _SPREAD))
    names = [*noted.names, "1|1||attention#9|dropout|what it changes"]
    return Noted(names, np.concatenate((noted.rows, row.reshape(1, NUMBERS + 2).astype(np.float32))), noted.raised)
