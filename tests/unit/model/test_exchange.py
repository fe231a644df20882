"""The exchange of experts in pieces, behind their products: what is computed, and which wait stands before what."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from qwen3_npu.kernels import select_kernels
from qwen3_npu.model.dispatcher import Dispatcher
from qwen3_npu.model.expert_parallel.exchange import Exchange, pieces_of
from qwen3_npu.model.experts import GroupedExperts

HIDDEN, FFN, EXPERTS = 8, 4, 4
COUNTS = [5, 0, 3, 7]


class LateExchanges:
    """Exchanges of one rank with itself, as late as may be: before somebody waits for it nothing has arrived."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def __call__(self, out: torch.Tensor, rows: torch.Tensor, *sizes: list[int], **options: Any) -> Any:
        assert options["async_op"]
        assert sizes == ([len(out)], [len(rows)])
        self.events.append("sets out")
        on_its_way = rows.detach().clone()
        out.detach().fill_(float("nan"))

        def wait() -> None:
            self.events.append("arrives")
            out.detach().copy_(on_its_way)

        return types.SimpleNamespace(wait=wait)


def noted(events: list[str], name: str, kernel: Callable) -> Callable:
    def call(*inputs: Any) -> Any:
        events.append(name)
        return kernel(*inputs)

    return call


def made(events: list[str], **options: bool) -> GroupedExperts:
    config = types.SimpleNamespace(
        hidden_size=HIDDEN,
        moe_ffn_hidden_size=FFN,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
        init_method=None,
        output_layer_init_method=None,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=1,
        tensor_model_parallel_size=1,
        recompute_granularity=None,
    )
    plain = select_kernels("torch")
    kernels = dataclasses.replace(
        plain,
        grouped_matmul=lambda counts: noted(events, "product", plain.grouped_matmul(counts)),
        add_grouped_gradient=noted(events, "gradient", plain.add_grouped_gradient),
    )
    group = types.SimpleNamespace(expt_tp=types.SimpleNamespace(size=lambda: 1))
    experts = GroupedExperts(EXPERTS, config, kernels=kernels, pg_collection=group, **options)
    draw = torch.Generator().manual_seed(1)
    for weight in experts.parameters():
        weight.data.normal_(generator=draw)
        weight.grad_added_to_main_grad = False
    return experts


def exchange(pieces: int) -> Exchange:
    everyone = np.array(COUNTS)[None, None]
    return Exchange(
        pieces_of(everyone, (0, 0), slice(0, EXPERTS), pieces),
        torch.tensor(COUNTS),
        width=HIDDEN,
        dtype=torch.float32,
        summed=torch.float32,
        group=None,
        tensor_group=None,
    )


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens with their router weights behind them, and a factor of each result."""
    draw = torch.Generator().manual_seed(2)
    return torch.randn(sum(COUNTS), HIDDEN + 4, generator=draw), torch.randn(sum(COUNTS), HIDDEN, generator=draw)


def by_hand(experts: GroupedExperts, rows: torch.Tensor) -> torch.Tensor:
    """SwiGLU of each expert's rows, one after the other."""
    first, second = experts.weight1.view(EXPERTS, HIDDEN, -1), experts.weight2.view(EXPERTS, FFN, -1)
    parts = []
    for number, part in enumerate(rows.split(COUNTS)):
        gate, up = (part[:, :HIDDEN] @ first[number]).chunk(2, -1)
        parts.append((torch.nn.functional.silu(gate) * up * part[:, HIDDEN : HIDDEN + 1]) @ second[number])
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("option", "has_sum"), [(None, True), (None, False), ("recompute_activation", True), ("recompute_products", False)]
)
@pytest.mark.parametrize("pieces", [1, 2, 3, 4])
def test_pieces_compute_what_each_expert_does(
    pieces: int, option: str | None, has_sum: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "all_to_all_single", LateExchanges([]))
    experts = made([], **({option: True} if option else {}))
    rows, factor = inputs()
    found = []
    for compute in (lambda x: experts(x, exchange(pieces), None)[0], lambda x: by_hand(experts, x)):
        mine = rows.clone().requires_grad_()
        is_first = not found
        for weight in experts.parameters():
            weight.grad = None
            if has_sum and is_first:
                weight.main_grad = torch.ones_like(weight)
        out = compute(mine)
        (out * factor).sum().backward()
        grads = [weight.grad for weight in experts.parameters()]
        if has_sum and is_first:
            assert all(weight.grad_added_to_main_grad for weight in experts.parameters())
            grads = [weight.main_grad - 1 for weight in experts.parameters()]
        found.append([out.detach(), mine.grad[:, : HIDDEN + 1], *grads])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_piece_is_under_way_while_another_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the gradients of a piece's weights are computed after its rows have set out."""
    events: list[str] = []
    monkeypatch.setattr(dist, "all_to_all_single", LateExchanges(events))
    experts = made(events)
    out, _ = experts(inputs()[0].requires_grad_(), exchange(2), None)
    computed = ["arrives", "product", "product", "sets out"]
    assert events == ["sets out", "sets out", *computed, *computed, "arrives", "arrives"]
    events.clear()
    out.sum().backward()
    computed += ["gradient", "gradient"]
    assert events == ["sets out", "sets out", *computed, *computed, "arrives", "arrives"]


def test_frozen_experts_compute_no_gradients_of_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(dist, "all_to_all_single", LateExchanges(events))
    experts = made(events).requires_grad_(False)
    rows = inputs()[0].requires_grad_()
    experts(rows, exchange(2), None)[0].sum().backward()
    assert "gradient" not in events
    assert rows.grad[:, : HIDDEN + 1].abs().sum(1).all()
    with torch.no_grad():
        out, _ = experts(rows, exchange(2), None)
    assert not out.requires_grad


def test_pieces_of_an_exchange_by_hand() -> None:
    """2 ranks with 4 experts each, one of them asked: rank 1."""
    everyone = np.array([[[1, 2, 3, 4, 5, 6, 7, 8]], [[10, 20, 30, 40, 50, 60, 70, 80]]])
    first, second = pieces_of(everyone, (1, 0), slice(4, 8), 2)
    assert (first.sent, second.sent) == ([30, 110], [70, 150])
    assert (first.received, second.received) == ([11, 110], [15, 150])
    assert first.chunks.tolist() == [[5, 6], [50, 60]]
    assert second.chunks.tolist() == [[7, 8], [70, 80]]
    assert (first.gathered, second.gathered) == ([121], [165])
    assert [piece.experts for piece in pieces_of(everyone, (1, 0), slice(4, 8), 3)] == [
        slice(0, 1),
        slice(1, 2),
        slice(2, 4),
    ]
    assert (first.experts, second.experts) == (slice(0, 2), slice(2, 4))


@pytest.mark.parametrize("pieces", [2, 4])
def test_rows_set_out_by_piece_then_rank_then_expert(pieces: int) -> None:
    """5 experts on each of 2 ranks; a rank's experts are 5 to 9 in the second half."""
    made = types.SimpleNamespace(num_local_experts=5, num_experts=10, ep_size=2, pieces=pieces, order=None)
    order = Dispatcher._by_piece(made, torch.arange(10).expand(3, 10))
    parts = {2: [[0, 1], [2, 3, 4]], 4: [[0], [1], [2], [3, 4]]}[pieces]
    expected = [expert + 5 * rank for part in parts for rank in range(2) for expert in part]
    assert order.tolist() == [expected] * 3
    made = types.SimpleNamespace(num_local_experts=4, num_experts=8, ep_size=2, pieces=2)
    assert Dispatcher._by_piece(made, torch.arange(8).expand(1, 8)).tolist() == [[0, 1, 4, 5, 2, 3, 6, 7]]
