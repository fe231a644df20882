"""What a step launches does not grow unseen."""

from __future__ import annotations

import pytest

import counts
from worlds import World


@pytest.fixture(scope="module")
def sized_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return counts.models(tmp_path_factory.mktemp("sized"))


@pytest.fixture(scope="module")
def losses() -> dict[str, list[float]]:
    """Of the rows so far, in bfloat16, of two and of four layers."""
    return {}


@pytest.mark.parametrize("name", counts.ROWS)
def test_a_simulated_npu(
    name: str,
    npu_worlds: dict[int, World],
    sized_models: dict[str, list[str]],
    tokens: str,
    losses: dict[str, list[float]],
) -> None:
    line, found = counts.row(npu_worlds[counts.ROWS[name][1]], name, sized_models, tokens)
    losses[name] = [one.get("loss", 0.0) for one in found]
    if counts.ROWS[name][:3] == ("untied", 2, 1) and "dense" in losses:
        assert losses[name] == pytest.approx(losses["dense"], rel=3e-3)
    assert line == counts.expected("npu")[name], f"python -m tests.npu_sim.counts writes the table; counted: {found}"


# At most so many operations of a layer forward and backward, and waits of the host in it.
BARS = {"dense": (13, 23, 0), "packed": (13, 23, 0), "LoRA": (20, 34, 0), "MoE": (26, 36, 0), "MoE EP2": (31, 41, 1)}
BARS |= {"ring CP2": (45, 45, 0)}


@pytest.mark.parametrize("name", BARS)
def test_layers_and_steps_keep_the_bars(name: str) -> None:
    """Of the committed table. A synchronisation of the device is a wait."""
    parts = ([float(x) for x in part.split()] for part in counts.expected("npu")[name].split("|")[1:])
    layer, outside = (dict(zip(counts.COLUMNS, part, strict=True)) for part in parts)
    found = (layer["fwd"], layer["bwd"], layer["waits"])
    assert all(n <= bar for n, bar in zip(found, BARS[name], strict=True)), found
    assert (outside["waits"], outside["copies"]) == (1, 1), "a wait a step and a copy a micro-batch"


def test_a_token_copies_nothing_of_the_cache_and_waits_once() -> None:
    (layer, outside) = ([float(x) for x in part.split()] for part in counts.expected("npu")["decode"].split("|")[1:])
    forward, waits = list(counts.COLUMNS).index("fwd"), list(counts.COLUMNS).index("waits")
    assert layer[forward] <= 16
    assert layer[waits] == 0
    assert outside[waits] <= 1


@pytest.mark.parametrize("name", counts.expected("cpu"))
def test_a_cpu(
    name: str, cpu_world: World, sized_models: dict[str, list[str]], tokens: str, losses: dict[str, list[float]]
) -> None:
    """And the loss is that of the NPU."""
    line, found = counts.row(cpu_world, name, sized_models, tokens)
    if name in losses:
        assert [one.get("loss", 0.0) for one in found] == pytest.approx(
            losses[name], rel=1e-2 if "MoE" in name else 3e-3
        )
    assert line == counts.expected("cpu")[name], f"python -m tests.npu_sim.counts writes the table; counted: {found}"
