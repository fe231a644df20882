"""Generation on simulated NPUs: transformers' tokens, and what the CPU computes."""

from __future__ import annotations

from pathlib import Path

import pytest

import generation
import quiz
import tiny
from worlds import World

LIMIT = 12
CASES = {
    "untied: TP2": ("untied", ["--tensor-model-parallel-size", "2"]),
    "moe: PP2": ("moe", ["--pipeline-model-parallel-size", "2"]),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_transformers(name: str, npu_worlds: dict[int, World], models: dict[str, str]) -> None:
    kind, flags = CASES[name]
    model = generation.transformers_model(models[kind])
    expected = generation.transformers_answers(model, generation.prompts(), LIMIT)
    assert npu_worlds[2].run("answers", folder=models[kind], flags=flags, limit=LIMIT) == expected


def test_greedy_sampled_and_beams_are_those_of_the_cpu(
    npu_worlds: dict[int, World], cpu_world: World, models: dict[str, str]
) -> None:
    two = npu_worlds[1], cpu_world
    found, expected = (world.run("generation_cases.answers", folder=models["moe"], flags=[]) for world in two)
    assert found == expected


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that reads text."""
    folder = tmp_path_factory.mktemp("reader")
    return str(quiz.write_tokenizer(tiny.write_model(folder / "hf", tiny.arch(vocab_size=800))))


def test_benchmarks_score_what_they_do_on_a_cpu(
    npu_worlds: dict[int, World], cpu_world: World, reader: str, tmp_path: Path
) -> None:
    data = str(quiz.write_mmlu(tmp_path / "mmlu", 1))
    rows = []
    for number, world in enumerate((npu_worlds[1], cpu_world)):
        (out := tmp_path / str(number)).mkdir()
        case = {"folder": reader, "flags": [], "data": data, "out": str(out)}
        rows.append([x for row in world.run("generation_cases.likelihoods", **case) for x in row])
    assert rows[0] == pytest.approx(rows[1], abs=1e-4)


def test_a_server_answers_as_on_a_cpu(npu_worlds: dict[int, World], cpu_world: World, reader: str) -> None:
    case = {"folder": reader, "flags": [], "texts": ["hello", "the answer", "and again", "one more"]}
    found, expected = (world.run("generation_cases.served", **case) for world in (npu_worlds[1], cpu_world))
    assert found == expected
    assert all(found)


def test_a_chat_answers(npu_worlds: dict[int, World], reader: str) -> None:
    shown = npu_worlds[1].run("chatted", folder=reader, typed="hello\nand again\n/exit\n")
    assert shown.count("You: ") == 3
    assert shown.count("qwen3_npu: ") == 2


def test_bfloat16_decodes_with_the_inference_operation(npu_worlds: dict[int, World], models: dict[str, str]) -> None:
    world, operation = npu_worlds[1], "npu_fused_infer_attention_score"
    before = world.run("operation_calls").get(operation, 0)
    got = world.run("answers", folder=models["untied"], flags=["--bf16"], limit=LIMIT)
    assert all(got)
    assert world.run("operation_calls")[operation] - before >= 4 * (LIMIT - 1), "a call per layer and token"
