"""Kernels on their own, for `benchmarks/gpu.py`: right beside the reference, and as fast as the device allows."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qwen3_npu import kernels
from qwen3_npu.kernels import Kernels

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # of |out - reference| / |reference|, gradients too


class Alone:
    """A tensor parallel group of one."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the cases are made of."""

    tokens: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head: int
    experts: int
    top: int
    expert_ffn: int
    vocabulary: int


CHECKED = Sizes(768, 1024, 1536, 8, 2, 128, 16, 4, 256, 5000)
TIMED = Sizes(4096, 4096, 12288, 32, 8, 128, 128, 8, 768, 151936)
TINY = Sizes(24, 32, 48, 4, 2, 16, 4, 2, 16, 70)


def boundaries(tokens: int) -> tuple[int, ...]:
    """Documents of uneven lengths, one of them a single token."""
    cuts = sorted({0, 1, tokens // 7, tokens // 3, tokens // 2 + 3, tokens})
    return tuple(cuts)


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation.

    Attributes:
        call: kernels and tensors -> a tensor.
        tensors: float32 inputs, all of which get gradients unless `forward_only`.
        bytes, flops: the fewest that forward must move and compute (backward: twice the flops, or all again and once
            more), of 16-bit tensors.
    """

    name: str
    call: Callable[..., torch.Tensor]
    tensors: Callable[[], list[torch.Tensor]]
    forward_only: bool = False
    bytes: float = 0.0
    flops: float = 0.0


def cases(s: Sizes, device: str) -> list[Case]:
    """All operations of a training step."""
    scale = s.head**-0.5

    def rn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device)

    def heads() -> list[torch.Tensor]:
        return [rn(s.tokens, 1, n, s.head) for n in (s.heads, s.groups, s.groups)]

    angles = rn(s.tokens, 1, 1, s.head // 2).repeat(1, 1, 1, 2)
    half = angles.cos().bfloat16(), angles.sin().bfloat16()
    tables = {torch.bfloat16: half, torch.float32: tuple(x.float() for x in half)}
    words = labels(s, device)
    pairs = s.tokens**2 / 2
    attended = 4 * pairs * s.heads * s.head
    bounds = boundaries(s.tokens)
    squares = sum((b - a) ** 2 for a, b in itertools.pairwise(bounds))

    def turn(k: Kernels, x: torch.Tensor) -> torch.Tensor:
        return k.rotary(x, *tables[x.dtype])

    wide, q_size = 2.0 * s.tokens, s.heads * s.head
    return [
        Case("attention", lambda k, *x: k.attention(*x, scale=scale), heads, flops=attended),
        Case(
            "attention, packed",
            lambda k, *x: k.attention(*x, scale=scale, cu_seqlens=bounds),
            heads,
            flops=2 * squares * s.heads * s.head,
        ),
        Case(
            "rms_norm",
            lambda k, x, w: k.rms_norm(x, w, 1e-6),
            lambda: [rn(s.tokens, 1, s.hidden), 1 + rn(s.hidden) / 4],
            bytes=2 * wide * s.hidden,
        ),
        Case(
            "rms_norm of heads",
            lambda k, x, w: k.rms_norm(x, w, 1e-6),
            lambda: [rn(s.tokens, 1, s.heads, s.head), 1 + rn(s.head) / 4],
            bytes=2 * wide * q_size,
        ),
        Case("rotary", turn, lambda: [rn(s.tokens, 1, s.heads, s.head)], bytes=2 * wide * q_size),
        Case("swiglu", lambda k, x: k.swiglu(x), lambda: [rn(s.tokens, 1, 2 * s.ffn)], bytes=3 * wide * s.ffn),
        Case(
            "cross_entropy",
            lambda k, x: k.cross_entropy(x, words, Alone(), s.vocabulary),
            lambda: [rn(s.tokens, 1, s.vocabulary)],
            bytes=wide * s.vocabulary,
        ),
        *_moe_cases(s, device),
    ]


def labels(s: Sizes, device: str) -> torch.Tensor:
    """[tokens, 1], one of them no word."""
    found = (torch.arange(s.tokens, device=device) * 7919 % s.vocabulary).unsqueeze(1)
    found[0] = -100
    return found


def _moe_cases(s: Sizes, device: str) -> list[Case]:
    hidden, rows = min(s.hidden, 2048), s.tokens * s.top
    chosen = torch.randn(s.tokens, s.experts, device=device).topk(s.top).indices
    routing_map = torch.zeros(s.tokens, s.experts, dtype=torch.bool, device=device).scatter(1, chosen, True)
    counts = routing_map.sum(0)

    def rn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device)

    def there_and_back(k: Kernels, tokens: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        copies, weights, places = k.permute(tokens, routing_map, probs, rows)
        return k.unpermute(copies * weights.unsqueeze(-1).to(copies.dtype), places, s.tokens)

    def grouped(k: Kernels, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return k.grouped_matmul(counts)(x, weight)

    width = 2 * s.expert_ffn
    return [
        Case(
            "weighted_swiglu",
            lambda k, x, w: k.weighted_swiglu(x, w),
            lambda: [rn(rows, width), rn(rows)],
            bytes=3.0 * rows * width,
        ),
        Case(
            "permute, unpermute",
            there_and_back,
            lambda: [rn(s.tokens, hidden), rn(s.tokens, s.experts).softmax(-1)],
            bytes=2.0 * (2 * s.tokens + 4 * rows) * hidden,
        ),
        Case(
            "grouped_matmul, up",
            grouped,
            lambda: [rn(rows, hidden), rn(s.experts, hidden, width) * hidden**-0.5],
            flops=2.0 * rows * hidden * width,
        ),
        Case(
            "grouped_matmul, down",
            grouped,
            lambda: [rn(rows, s.expert_ffn), rn(s.experts, s.expert_ffn, hidden) * s.expert_ffn**-0.5],
            flops=1.0 * rows * hidden * width,
        ),
    ]


def block_cases(s: Sizes, device: str) -> list[Case]:
    """Ring attention's blocks, which know no autograd."""
    scale = s.head**-0.5

    def heads() -> list[torch.Tensor]:
        return [torch.randn(s.tokens, 1, n, s.head, device=device) for n in (s.heads, s.groups, s.groups)]

    def block(cu_seqlens: tuple[int, ...] | None) -> Callable[..., torch.Tensor]:
        def call(k: Kernels, *x: torch.Tensor) -> torch.Tensor:
            out, lse = k.attention_block(*x, scale=scale, cu_seqlens=cu_seqlens)
            return torch.cat((out.float().flatten(), lse.flatten()))

        return call

    def back(cu_seqlens: tuple[int, ...] | None) -> Callable[..., torch.Tensor]:
        def call(k: Kernels, grad: torch.Tensor, *x: torch.Tensor) -> torch.Tensor:
            exact = kernels.select_kernels("reference").attention_block
            out, lse = exact(*(t.float() for t in x), scale=scale, cu_seqlens=cu_seqlens)
            grads = k.attention_block_backward(
                grad, *x, out=out.to(grad.dtype), lse=lse, scale=scale, cu_seqlens=cu_seqlens
            )
            return torch.cat([g.float().flatten() for g in grads])

        return call

    found = []
    for name, bounds in (("whole", None), ("causal", (0, s.tokens)), ("packed", boundaries(s.tokens))):
        found.append(Case(f"attention_block, {name}", block(bounds), heads, forward_only=True))
        found.append(
            Case(f"attention_block_backward, {name}", back(bounds), lambda: [heads()[0], *heads()], forward_only=True)
        )
    return found


def gradient_cases(s: Sizes, device: str) -> list[Case]:
    """Gradients of weights, added to megatron's sums over the micro-batches."""
    hidden, rows, width = min(s.hidden, 2048), s.tokens * s.top, 2 * s.expert_ffn
    counts = torch.randint(s.experts, (rows,), device=device).bincount(minlength=s.experts)

    def rn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device)

    def linear(k: Kernels, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        total = torch.ones(grad.shape[1], x.shape[1], device=x.device)
        k.add_weight_gradient(x, grad, total)
        return total

    def experts(k: Kernels, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        parameter = torch.nn.Parameter(weight.flatten(0, 1).clone())
        total = torch.ones(parameter.shape, device=x.device)
        marks = vars(parameter)
        marks["main_grad"], marks["grad_added_to_main_grad"] = total, False
        k.grouped_matmul(counts)(x, parameter.view(weight.shape)).backward(grad)
        assert parameter.grad is not None
        return total if marks["grad_added_to_main_grad"] else total + parameter.grad

    return [
        Case("weight gradient", linear, lambda: [rn(s.tokens, s.hidden), rn(s.tokens, s.ffn)], forward_only=True),
        Case(
            "weight gradient of experts",
            experts,
            lambda: [rn(rows, hidden), rn(s.experts, hidden, width) * hidden**-0.5, rn(rows, width)],
            forward_only=True,
        ),
    ]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|; not a number never passes."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def errors(case: Case, ours: Kernels, reference: Kernels, dtype: torch.dtype) -> dict[str, float]:
    """Of the result and of each gradient, against the reference in float32 on the same (rounded) inputs."""
    given = [x.to(dtype) for x in case.tensors()]
    results = []
    for chosen, as_dtype in ((ours, dtype), (reference, torch.float32)):
        inputs = [x.to(as_dtype).requires_grad_(not case.forward_only) for x in given]
        out = case.call(chosen, *inputs)
        found = [out]
        if not case.forward_only:
            generator = torch.Generator(out.device).manual_seed(1)
            grad = torch.randn(out.shape, generator=generator, device=out.device).to(dtype)
            found += torch.autograd.grad(out, inputs, grad.to(out.dtype))
        results.append([x.detach() for x in found])
    names = ["out", *(f"grad {i}" for i in range(len(given)))]
    return {name: distance(a, b) for name, a, b in zip(names, *results, strict=False)}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nothing was written to holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(device: str, sizes: Sizes, record: Callable[[str, Any], None]) -> None:
    """Every operation in both dtypes."""
    ours, reference = kernels.select_kernels("auto", device), kernels.select_kernels("reference")
    record("kernels", str(ours))
    for case in (*cases(sizes, device), *block_cases(sizes, device), *gradient_cases(sizes, device)):
        for dtype, bound in BOUNDS.items():
            name = f"{case.name} {str(dtype).removeprefix('torch.')}"
            try:
                with poisoned():
                    found = errors(case, ours, reference, dtype)
                worst = max(found.values(), key=lambda x: float("inf") if x != x else x)
                record(name, {"errors": found, "worst": worst, "ok": worst < bound})
            except Exception as error:  # the next operation is tried all the same
                record(name, {"failed": f"{type(error).__name__}: {error}"[:600], "ok": False})
