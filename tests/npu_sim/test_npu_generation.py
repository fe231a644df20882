"""Generation on simulated NPUs gives transformers' tokens."""

from __future__ import annotations

import pytest

import generation
from worlds import World

LIMIT = 12
CASES = {
    "untied: one device": ("untied", 1, []),
    "untied: TP2": ("untied", 2, ["--tensor-model-parallel-size", "2"]),
    "moe: one device": ("moe", 1, []),
    "moe: PP2": ("moe", 2, ["--pipeline-model-parallel-size", "2"]),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_transformers(name: str, npu_worlds: dict[int, World], models: dict[str, str]) -> None:
    kind, size, flags = CASES[name]
    model = generation.transformers_model(models[kind])
    expected = generation.transformers_answers(model, generation.prompts(), LIMIT)
    assert npu_worlds[size].run("answers", folder=models[kind], flags=flags, limit=LIMIT) == expected


def test_bfloat16_decodes_with_the_inference_operation(npu_worlds: dict[int, World], models: dict[str, str]) -> None:
    world, operation = npu_worlds[1], "npu_fused_infer_attention_score"
    before = world.run("operation_calls").get(operation, 0)
    got = world.run("answers", folder=models["untied"], flags=["--bf16"], limit=LIMIT)
    assert all(got)
    assert world.run("operation_calls")[operation] - before >= 4 * (LIMIT - 1), "a call per layer and token"
