"""Two computations by turns: who runs when, what each finds, and what becomes of an error."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from qwen3_npu.distributed.turns import by_turns, offer_turn, pass_turn


class Log:
    """What was computed, in order, and a state that each side sets for itself."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.state = "start"

    def keep(self, is_second: bool) -> Callable[[], None]:
        state = self.state
        return lambda: setattr(self, "state", state)

    def steps(self, name: str, count: int, between: Callable[[], None] = pass_turn) -> Callable[[], str]:
        def run() -> str:
            for number in range(count):
                self.state = f"{name}{number}"
                self.said.append(self.state)
                between()
                assert self.state == f"{name}{number}", "the other one's state"
            return name

        return run


@pytest.mark.parametrize(("first", "second"), [(2, 2), (4, 1), (1, 3)])
def test_they_alternate_until_one_is_done(first: int, second: int) -> None:
    log = Log()
    assert by_turns(log.steps("f", first), log.steps("b", second), log.keep) == ("f", "b")
    both = min(first, second)
    expected = [name for number in range(both) for name in (f"b{number}", f"f{number}")]
    longer, most = ("b", second) if second > first else ("f", first)
    assert log.said == expected + [f"{longer}{number}" for number in range(both, most)]
    pass_turn()  # nobody is there any more


def test_only_the_own_side_offers() -> None:
    log = Log()
    by_turns(log.steps("f", 2, offer_turn), log.steps("b", 2, offer_turn), log.keep)
    assert log.said == ["b0", "b1", "f0", "f1"]


@pytest.mark.parametrize("who", ["f", "b"])
def test_an_error_of_either_ends_both(who: str) -> None:
    log, before = Log(), threading.active_count()

    def fails() -> None:
        pass_turn()
        raise ValueError(who)

    pair = (fails, log.steps("b", 3)) if who == "f" else (log.steps("f", 3), fails)
    with pytest.raises(ValueError, match=who):
        by_turns(*pair, log.keep)
    assert len(log.said) < 3
    assert threading.active_count() == before
    assert by_turns(log.steps("f", 1), log.steps("b", 1), log.keep) == ("f", "b")


def test_backward_runs_beside_forward() -> None:
    """An autograd function that passes the turn, as the exchange of experts does."""
    said = []

    class Passing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor, name: str) -> torch.Tensor:
            ctx.name = name
            said.append(f"forward {name}")
            pass_turn()
            return x * 2

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> tuple:
            said.append(f"backward {ctx.name}")
            pass_turn()
            return grad * 2, None

    x = torch.ones(2, requires_grad=True)
    out = Passing.apply(Passing.apply(x, "a"), "b").sum()
    said.clear()
    other, _ = by_turns(lambda: Passing.apply(Passing.apply(x, "c"), "d"), out.backward, lambda is_second: lambda: None)
    assert said == ["backward b", "forward c", "backward a", "forward d"]
    assert x.grad.tolist() == [4.0, 4.0]
    assert other.requires_grad
