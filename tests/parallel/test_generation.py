"""Any way of cutting the model says what transformers says, and with the same seed the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import generation
import harness_tasks
import quiz
import tiny
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
    ("few", ["--tensor-model-parallel-size", "4"]),
    ("qwen2", TP2 + PP2),
    ("yarn", TP2),
]
KINDS = sorted({kind for kind, _ in CASES})


@pytest.fixture(scope="module")
def expected(models: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What transformers answers, and what one process of ours samples."""
    found = {}
    for kind in KINDS:
        model, prompts = generation.transformers_model(models[kind]), generation.prompts()
        greedy = generation.transformers_answers(model, prompts, 24)
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
    return {kind: run("generation_cases.answers", folder=models[kind], flags=[])["sampled"] for kind in KINDS}


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


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models with a tokenizer."""
    root = tmp_path_factory.mktemp("readers")
    found = {kind: tiny.write_model(root / kind, tiny.arch(kind, vocab_size=800)) for kind in ("tied", "moe")}
    return {kind: str(quiz.write_tokenizer(folder)) for kind, folder in found.items()}


@pytest.mark.parametrize(("kind", "flags"), [("tied", TP2 + PP2), ("moe", TP2 + EP2)])
def test_serves_what_transformers_says(
    kind: str, flags: list[str], worlds: dict[int, World], readers: dict[str, str]
) -> None:
    """Rank 0 serves HTTP, the others follow; a second copy of the model serves its experts."""
    from transformers import AutoTokenizer

    texts = ["Once", "The lighthouse keeper", "Once upon a time", "a", "The sea"]
    model, tokenizer = generation.transformers_model(readers[kind]), AutoTokenizer.from_pretrained(readers[kind])
    tokens = [tokenizer(text).input_ids for text in texts]
    expected = generation.transformers_answers(model, tokens, 6, eos_token_id=[0, 1, 2])
    got = worlds[4].run("generation_cases.served", folder=readers[kind], flags=flags, texts=texts)
    assert got == [tokenizer.decode(answer) for answer in expected]


def test_lm_evaluation_harness_says_what_it_says_of_transformers(
    worlds: dict[int, World], readers: dict[str, str], tmp_path: Path
) -> None:
    """On two copies of the model, each sharded over two processes, which take different requests."""
    pytest.importorskip("lm_eval", reason="the comparison needs lm-evaluation-harness (pip install lm-eval)")
    (tmp_path / "theirs").mkdir()
    expected = harness_tasks.of_transformers(Path(readers["tied"]), tmp_path / "theirs")
    flags = "tensor-model-parallel-size=2,max-position-embeddings=512"
    given = {"folder": readers["tied"], "flags": flags, "out": str(tmp_path)}
    got = worlds[4].run("generation_cases.harnessed", **given)
    assert got["copies"] == 2
    harness_tasks.assert_same(got, expected)


@pytest.mark.parametrize(("kind", "flags"), [("tied", TP2 + PP2), ("moe", EP2 + PP2)])
def test_scores_what_one_process_scores(
    kind: str, flags: list[str], worlds: dict[int, World], readers: dict[str, str], tmp_path: Path
) -> None:
    given = {"folder": readers[kind], "data": str(quiz.write_mmlu(tmp_path / "mmlu", 4)), "out": str(tmp_path)}
    alone = worlds[1].run("generation_cases.likelihoods", flags=[], **given)
    together = worlds[4].run("generation_cases.likelihoods", flags=[*flags, "--sequence-parallel"], **given)
    assert len(alone) == 4 + 5 + 6
    assert [x for row in together for x in row] == pytest.approx([x for row in alone for x in row], abs=1e-4)
