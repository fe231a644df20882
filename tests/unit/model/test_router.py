"""The choice of experts and the balancing loss's gradient, against megatron-core's own functions under autograd."""

from __future__ import annotations

import types

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3_npu.model.router import Router, _Choice, _Gate, first_tokens

TOPK, EXPERTS, TOKENS = 2, 5, 7


def router(coefficient: float, loss_weight: float) -> types.SimpleNamespace:
    """What `_Choice` needs of a router, without process groups."""
    made = types.SimpleNamespace(
        topk=TOPK,
        config=types.SimpleNamespace(num_moe_experts=EXPERTS),
        tp_cp_group=types.SimpleNamespace(size=lambda: 1),
        get_aux_loss_coeff=lambda name: coefficient,
        loss_weight=loss_weight,
        seen=[],
        balance_loss=torch.zeros(()),
        balance_rows=torch.zeros(0),
        micro_batches=0.0,
        counts_of_all=lambda counts: counts,
    )
    made.note = made.seen.append
    made.balance_gradient = types.MethodType(Router.balance_gradient, made)
    return made


@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_choice_and_gradients_are_megatrons(coefficient: float, padded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_utils.MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.tensor(0.5))
    draw = torch.Generator().manual_seed(0)
    logits, factor = (torch.randn(TOKENS, EXPERTS, generator=draw) for _ in range(2))
    padding = torch.arange(TOKENS) >= TOKENS - padded if padded else None
    made, mine, theirs = router(coefficient, 4.0), logits.clone().requires_grad_(), logits.clone().requires_grad_()

    probs, routing_map, counts = _Choice.apply(mine, made, True, padding)
    (probs * factor).sum().backward()

    expected, expected_map = moe_utils.topk_routing_with_score_function(theirs, TOPK)
    real_map, scores = moe_utils.compute_routing_scores_for_aux_loss(theirs, TOPK, "softmax", padding_mask=padding)
    loss = moe_utils.switch_load_balancing_loss_func(
        scores, real_map.sum(0), TOKENS - padded, TOPK, EXPERTS, moe_aux_loss_coeff=1.0
    )
    ((expected * factor).sum() + 0.5 * 4.0 * coefficient * loss).backward()

    torch.testing.assert_close(probs, expected)
    assert torch.equal(routing_map, expected_map)
    assert torch.equal(counts, expected_map.sum(0))
    assert torch.equal(made.seen[0], real_map.sum(0))
    torch.testing.assert_close(mine.grad, theirs.grad)
    if coefficient:
        torch.testing.assert_close(made.balance_rows.sum(), loss.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gate_adds_what_else_happens_to_the_hidden_state(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(1)
    x, weight = torch.randn(3, 2, 8, generator=draw), torch.randn(4, 8, generator=draw)
    grads = []
    for gate in (
        lambda x, w: _Gate.apply(x, w, dtype, None),
        lambda x, w: (torch.nn.functional.linear(x.to(dtype), w.to(dtype)), x),
    ):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        logits, passed = gate(*inputs)
        (logits.square().sum() + passed.pow(3).sum()).backward()
        grads.append([logits.detach(), *(t.grad for t in inputs)])
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)


class Operations(TorchDispatchMode):
    """Counts."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_padding_launches_few_operations_more() -> None:
    """megatron's functions and their gradients, which served padded batches before, are some sixty."""
    counts = []
    for padding in (None, torch.arange(TOKENS) > 4):
        made, logits = router(0.3, 1.0), torch.randn(TOKENS, EXPERTS, requires_grad=True)
        with Operations() as operations:
            _Choice.apply(logits, made, True, padding)[0].sum().backward()
        counts.append(operations.count)
    assert counts[1] - counts[0] <= 12


def test_the_rows_of_full_experts_are_those_of_megatrons_sort() -> None:
    tokens, capacity = 40, 9
    drawn = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(0))
    chosen = drawn >= drawn.topk(capacity, dim=0).values[-1]
    rows, _, places = moe_utils.permute(drawn, chosen, num_out_tokens=capacity * EXPERTS, drop_and_pad=True)
    assert torch.equal(first_tokens(chosen, capacity).flatten(), places)
    assert torch.equal(drawn[places], rows)


def test_the_first_choices_of_an_expert_come_before_what_pads_it() -> None:
    chosen = torch.tensor([[0, 1], [1, 1], [0, 0], [1, 1]], dtype=torch.bool)
    assert first_tokens(chosen, 3).tolist() == [[1, 3, 0], [0, 1, 3]]
