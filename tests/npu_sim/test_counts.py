"""What a step launches does not grow unseen."""

from __future__ import annotations

import pytest

import counts
from worlds import World


@pytest.fixture(scope="module")
def sized_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return counts.models(tmp_path_factory.mktemp("sized"))


@pytest.mark.parametrize("name", counts.ROWS)
def test_a_simulated_npu(
    name: str, npu_worlds: dict[int, World], sized_models: dict[str, list[str]], tokens: str
) -> None:
    line, found = counts.row(npu_worlds[counts.ROWS[name][1]], name, sized_models, tokens)
    assert line == counts.expected("npu")[name], f"python -m tests.npu_sim.counts writes the table; counted: {found}"


def test_a_token_copies_nothing_of_the_cache_and_waits_once() -> None:
    (layer, outside) = ([float(x) for x in part.split()] for part in counts.expected("npu")["decode"].split("|")[1:])
    forward, waits = list(counts.COLUMNS).index("fwd"), list(counts.COLUMNS).index("waits")
    assert layer[forward] <= 16
    assert layer[waits] == 0
    assert outside[waits] <= 1


@pytest.mark.parametrize("name", counts.expected("cpu"))
def test_a_cpu(name: str, cpu_world: World, sized_models: dict[str, list[str]], tokens: str) -> None:
    line, found = counts.row(cpu_world, name, sized_models, tokens)
    assert line == counts.expected("cpu")[name], f"python -m tests.npu_sim.counts writes the table; counted: {found}"
