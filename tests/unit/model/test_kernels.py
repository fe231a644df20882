"""Every implementation of an operation equals the reference, forward and gradient."""

from __future__ import annotations

import threading

import pytest
import torch

from qwen3_npu import kernels
from qwen3_npu.errors import UsageError
from qwen3_npu.kernels import reference

OTHERS = ["torch", "cuda"]  # those of an NPU: tests/npu_sim


@pytest.fixture(params=OTHERS)
def implementation(request: pytest.FixtureRequest) -> kernels.Kernels:
    return selected(request.param)


def selected(name: str) -> kernels.Kernels:
    """The GPU's kernels run here, too: Triton interprets them (conftest.py)."""
    if name != "cuda":
        return kernels.select_kernels(name)
    pytest.importorskip("triton", reason="triton is not installed: it comes with torch for CUDA")
    return kernels.select_kernels("cuda", "cuda")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def assert_same(kernel, definition, *tensors: torch.Tensor, **options) -> None:
    """Equal values, and equal gradients of a random projection of them."""
    results = []
    for function in (kernel, definition):
        inputs = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
        out = function(*inputs, **options)
        (out * randn(*out.shape, seed=7)).sum().backward()
        results.append([out.detach(), *(t.grad for t in inputs)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("length", [1, 17, 64, 150])
def test_attention(implementation: kernels.Kernels, length: int, heads: tuple[int, int]) -> None:
    q, k, v = (
        randn(length, 2, heads[0], 16),
        randn(length, 2, heads[1], 16, seed=1),
        randn(length, 2, heads[1], 16, seed=2),
    )
    assert_same(implementation.attention, reference.attention, q, k, v, scale=0.25)


@pytest.mark.parametrize("queries", [1, 5])
def test_attention_of_the_last_positions(implementation: kernels.Kernels, queries: int) -> None:
    k, v = randn(17, 2, 2, 16), randn(17, 2, 2, 16, seed=1)
    assert_same(implementation.attention, reference.attention, randn(queries, 2, 4, 16), k, v, scale=0.25)


@pytest.mark.parametrize("boundaries", [[0, 20], [0, 1, 2, 20], [0, 7, 13, 20]])
def test_packed_attention(implementation: kernels.Kernels, boundaries: list[int]) -> None:
    q, k, v = randn(20, 1, 4, 16), randn(20, 1, 2, 16, seed=1), randn(20, 1, 2, 16, seed=2)
    assert_same(implementation.attention, reference.attention, q, k, v, scale=0.25, cu_seqlens=boundaries)


def test_reference_attention_is_causal_and_keeps_documents_apart() -> None:
    q, k, v = randn(9, 1, 2, 8), randn(9, 1, 2, 8, seed=1), randn(9, 1, 2, 8, seed=2)
    out = reference.attention(q, k, v, scale=1.0, cu_seqlens=[0, 4, 9])
    changed = v.clone()
    changed[3] += 1
    moved = (reference.attention(q, k, changed, scale=1.0, cu_seqlens=[0, 4, 9]) - out).abs().amax((1, 2, 3)) > 0
    assert moved.tolist() == [i == 3 for i in range(9)]
    expected = torch.softmax((q[5, 0, 0] * k[4:6, 0, 0]).sum(-1), 0) @ v[4:6, 0, 0]
    torch.testing.assert_close(out[5, 0, 0], expected)


@pytest.mark.parametrize("shape", [(1, 1, 16), (17, 2, 96), (3, 2, 300)])
def test_rms_norm(implementation: kernels.Kernels, shape: tuple[int, ...]) -> None:
    assert_same(implementation.rms_norm, reference.rms_norm, randn(*shape), 1 + randn(shape[-1]), eps=1e-6)


def test_a_norms_weight_gradient_is_added_in_float32() -> None:
    grad, found = randn(17, 2, 96), []
    for chosen in (selected("cuda"), reference):
        weight = torch.nn.Parameter(1 + randn(96))
        weight.main_grad, weight.grad_added_to_main_grad = randn(96), False
        chosen.rms_norm(randn(17, 2, 96), weight, 1e-6).backward(grad)
        added = weight.grad_added_to_main_grad
        assert added == (chosen is not reference)
        found.append(weight.main_grad + (0 if added else weight.grad))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_add_rms_norm(implementation: kernels.Kernels) -> None:
    def joined(kernel):
        return lambda *inputs, eps: torch.cat(kernel(*inputs, eps))

    inputs = randn(17, 2, 96), randn(17, 2, 96, seed=3), 1 + randn(96)
    assert_same(joined(implementation.add_rms_norm), joined(reference.add_rms_norm), *inputs, eps=1e-2)
    normed, total = reference.add_rms_norm(*inputs, 1e-2)
    torch.testing.assert_close(total, inputs[0] + inputs[1])
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(total, (96,), inputs[2], 1e-2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_gradient_is_added_in_float32(implementation: kernels.Kernels, dtype: torch.dtype) -> None:
    x, grad, total = randn(50, 6).to(dtype), randn(50, 4).to(dtype), randn(4, 6)
    expected = total.double() + grad.double().t() @ x.double()
    implementation.add_weight_gradient(x, grad, total)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 70, 2], [0, 0, 9, 0]])
def test_weight_gradients_of_experts_are_added_in_float32(counts: list[int], dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="triton is not installed: it comes with torch for CUDA")
    from qwen3_npu.kernels.fused.grouped import add_products

    x, grad, total = randn(sum(counts), 20).to(dtype), randn(sum(counts), 12).to(dtype), randn(4, 20, 12)
    pairs = zip(x.double().split(counts), grad.double().split(counts), strict=True)
    expected = total.double() + torch.stack([left.t() @ right for left, right in pairs])
    add_products(x, grad, total, torch.tensor(counts).cumsum(0, dtype=torch.int32))
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)


def test_rotary(implementation: kernels.Kernels) -> None:
    angles = randn(17, 1, 1, 8)
    cos, sin = (f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))
    for function in (implementation.rotary, reference.rotary):
        rotated = function(randn(17, 2, 4, 16), cos, sin)
        torch.testing.assert_close(rotated.norm(dim=-1), randn(17, 2, 4, 16).norm(dim=-1))
    assert_same(
        lambda x: implementation.rotary(x, cos, sin), lambda x: reference.rotary(x, cos, sin), randn(17, 2, 4, 16)
    )


@pytest.mark.parametrize("length", [1, 17])
def test_swiglu(implementation: kernels.Kernels, length: int) -> None:
    assert_same(implementation.swiglu, reference.swiglu, randn(length, 2, 96))


@pytest.mark.parametrize("width", [96, 2600])
def test_weighted_swiglu(implementation: kernels.Kernels, width: int) -> None:
    assert_same(implementation.weighted_swiglu, reference.weighted_swiglu, randn(5, width), randn(5))
    assert implementation.weighted_swiglu(randn(0, width), randn(0)).shape == (0, width // 2)


def test_reference_swiglu_gates_with_the_first_half() -> None:
    x = torch.tensor([0.0, 5.0, 3.0, 4.0])
    torch.testing.assert_close(reference.swiglu(x), torch.tensor([0.0, 5.0 / (1 + 2.718281828**-5.0) * 4.0]))


@pytest.mark.parametrize("counts", [[3, 0, 4, 2], [0, 0, 9, 0], [0, 0, 0, 0]])
def test_grouped_matmul(implementation: kernels.Kernels, counts: list[int]) -> None:
    x, weight = randn(sum(counts), 8), randn(4, 8, 6)
    groups = torch.tensor(counts)
    assert_same(implementation.grouped_matmul(groups), reference.grouped_matmul(groups), x, weight)


@pytest.mark.parametrize("has_sum", [True, False])
def test_a_16_bit_grouped_product_has_the_gradients_of_the_reference(has_sum: bool) -> None:
    groups, total = torch.tensor([3, 0, 4, 2]), randn(32, 16)
    x, weight, grad = randn(9, 8).bfloat16(), randn(32, 16).bfloat16(), randn(9, 16).bfloat16()
    found = []
    for chosen in (selected("cuda"), reference):
        rows, parameter = x.clone().requires_grad_(), torch.nn.Parameter(weight.clone())
        parameter.grad_added_to_main_grad = False
        if has_sum:
            parameter.main_grad = total.clone()
        chosen.grouped_matmul(groups)(rows, parameter.view(4, 8, 16)).backward(grad)
        added = parameter.grad_added_to_main_grad
        assert added == (has_sum and chosen is not reference)
        found.append((rows.grad.float(), parameter.main_grad if added else parameter.grad + (total if has_sum else 0)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected.to(got.dtype), rtol=2e-2, atol=2e-2)


def test_permute_and_unpermute(implementation: kernels.Kernels) -> None:
    tokens, probs = randn(9, 8), randn(9, 4).softmax(-1)
    chosen = probs.topk(2).indices
    routing_map = torch.zeros(9, 4, dtype=torch.bool).scatter(1, chosen, True)
    rows, weights, indices = implementation.permute(tokens, routing_map, probs, 18)
    expected = [(expert, token) for expert in range(4) for token in range(9) if routing_map[token, expert]]
    torch.testing.assert_close(rows, torch.stack([tokens[token] for _, token in expected]))
    torch.testing.assert_close(weights, torch.stack([probs[token, expert] for expert, token in expected]))
    back = implementation.unpermute(rows * weights[:, None], indices, 9)
    torch.testing.assert_close(back, tokens * probs.gather(1, chosen).sum(1, keepdim=True))


def test_gradients_of_permuted_tokens_and_of_their_probabilities(implementation: kernels.Kernels) -> None:
    probs = randn(9, 5).softmax(-1)
    routing_map = torch.zeros(9, 5, dtype=torch.bool).scatter(1, probs.topk(2).indices, True)

    def there_and_back(chosen, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows, weight, places = chosen.permute(tokens, routing_map, weights, 18)
        return chosen.unpermute(rows.tanh() * weight[:, None], places, 9)

    assert_same(
        lambda *x: there_and_back(implementation, *x), lambda *x: there_and_back(reference, *x), randn(9, 8), probs
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_cross_entropy_of_a_sharded_vocabulary_is_that_of_torch(
    implementation: kernels.Kernels, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, width = 150, 160  # ten rows of padding
    logits, labels = randn(6, 2, width), torch.arange(12).view(6, 2) * 13
    whole = logits[..., :words].clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(whole.flatten(0, 1), labels.flatten(), reduction="none").view(6, 2)
    (expected * randn(6, 2)).sum().backward()
    ranks_of = Ranks(ranks)
    monkeypatch.setattr(torch.distributed, "all_reduce", ranks_of.all_reduce)

    def rank(number: int) -> None:
        shard = logits.chunk(ranks, -1)[number].clone().requires_grad_()
        with ranks_of.lock:
            loss = implementation.cross_entropy(shard, labels, ranks_of.group(number), words)
            (loss * randn(6, 2)).sum().backward()
        found[number] = loss.detach(), shard.grad

    found: dict[int, tuple] = {}
    threads = [threading.Thread(target=rank, args=(number,)) for number in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gradient = torch.cat([found[number][1] for number in range(ranks)], -1)
    torch.testing.assert_close(gradient[..., :words], whole.grad, rtol=1e-5, atol=1e-6)
    assert not gradient[..., words:].any()
    for number in range(ranks):
        torch.testing.assert_close(found[number][0], expected.detach())


class Ranks:
    """Threads as ranks of one group: what they reduce is added up, or the largest of it taken."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.given = size, threading.Barrier(size, timeout=10), {}
        self.lock = threading.Lock()  # Triton interprets in one thread at a time

    def group(self, number: int):
        return type("Group", (), {"rank": lambda _: number, "size": lambda _: self.size})()

    def all_reduce(self, tensor: torch.Tensor, op=torch.distributed.ReduceOp.SUM, group=None) -> None:
        self.given[group.rank()] = tensor.clone()
        self._meet()
        everyone = torch.stack([self.given[number] for number in range(self.size)])
        tensor.copy_(everyone.amax(0) if op == torch.distributed.ReduceOp.MAX else everyone.sum(0))
        self._meet()

    def _meet(self) -> None:
        self.lock.release()
        self.barrier.wait()
        self.lock.acquire()


def test_selection_is_printed_and_a_typo_refused() -> None:
    first, *others = str(kernels.select_kernels("torch", "cpu", ["attention=reference"])).split("; ")
    assert first == "torch"
    assert [other.split(":")[0] for other in others] == ["reference"]  # names that --kernels takes, each once
    assert others[0].startswith("reference: attention ")
    assert others[0].endswith(" cross_entropy")
    with pytest.raises(UsageError, match="--kernels fast: known are"):
        kernels.select_kernels("fast")


def test_single_operations_are_overridden() -> None:
    chosen = kernels.select_kernels("torch", "cpu", ["attention=reference"])
    assert chosen.attention is reference.attention
    assert chosen.rms_norm is not reference.rms_norm
    for wrong in ("attention", "atention=reference", "attention=fast"):
        with pytest.raises(UsageError, match=f"--kernel-overrides {wrong}: give operation=implementation"):
            kernels.select_kernels("torch", "cpu", [wrong])


def test_the_kernels_of_a_gpu_are_refused_elsewhere_and_what_misses_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UsageError, match="--kernels cuda: runs on a CUDA GPU only, and the device is cpu"):
        kernels.select_kernels("cuda", "cpu")
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    said: list[str] = []
    monkeypatch.setattr(kernels.log, "info", said.append)
    kernels.tell_once.cache_clear()
    assert kernels.select_kernels("auto", "cuda").swiglu.__module__.endswith("torch_native")
    assert said == ["warning: torch's kernels instead of the GPU's: triton is not installed; --kernels cuda needs it"]


@pytest.mark.parametrize("name", ["npu", "mindspeed"])
def test_a_forced_kernel_of_another_device_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"--kernels {name}: runs on an NPU only, and the device is cuda"):
        kernels.select_kernels(name, "cuda")
    with pytest.raises(UsageError, match=f"--kernel-overrides swiglu={name}: runs on an NPU only"):
        kernels.select_kernels("auto", "cpu", [f"swiglu={name}"])
