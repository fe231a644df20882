"""Any way of cutting the model says what transformers says, and with the same seed the same samples."""

from __future__ import annotations

from typing import Any

import pytest

import generation
from worlds import World

TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
EP2 = ["--expert-model-parallel-size", "2"]
# On four processes; what the layout leaves over are copies of the model that share the prompts.
CASES = [
    ("untied", TP2),
    ("tied", TP2 + PP2),
    ("untied", [*PP2, "--noop-layers", "0,5"]),
    ("moe", EP2),
    ("moe", TP2 + EP2),
    ("moe", TP2 + PP2),
]


@pytest.fixture(scope="module")
def expected(models: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What transformers answers, and what one process of ours samples."""
    found = {}
    for kind, folder in models.items():
        model, prompts = generation.transformers_model(folder), generation.prompts()
        greedy = generation.transformers_answers(model, prompts, 64)
        found[kind] = {
            "greedy": greedy,
            "no prefix cache": [answer[:12] for answer in greedy],
            "no cache": [answer[:8] for answer in greedy],
            "beams": generation.transformers_answers(model, prompts[2:3], 12, num_beams=3),
        }
    return found


@pytest.fixture(scope="module")
def samples(worlds: dict[int, World], models: dict[str, str]) -> dict[str, Any]:
    """What one process samples."""
    run = worlds[1].run
    return {kind: run("generation_cases.answers", folder=models[kind], flags=[])["sampled"] for kind in models}


@pytest.mark.parametrize(("kind", "flags"), CASES, ids=[f"{k}: {' '.join(f)}" for k, f in CASES])
def test_says_what_transformers_says(
    kind: str,
    flags: list[str],
    worlds: dict[int, World],
    models: dict[str, str],
    expected: dict[str, dict[str, Any]],
    samples: dict[str, Any],
) -> None:
    got = worlds[4].run("generation_cases.answers", folder=models[kind], flags=flags)
    assert got.pop("sampled") == samples[kind]
    assert got == expected[kind]
