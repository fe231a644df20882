"""lm-evaluation-harness with our engine as its model: the scores of its own Hugging Face backend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import quiz
import tiny

lm_eval = pytest.importorskip("lm_eval", reason="the comparison needs lm-evaluation-harness (pip install lm-eval)")

TEXT = "the model reads a text and says what comes next in it before the end of the line"
WORDS = TEXT.split()
DOCS = [
    {"q": " ".join(WORDS[i : i + 7]), "choices": [" ".join(WORDS[j : j + n]) for j, n in ((i, 1), (3, 2), (8, 3))]}
    for i in range(8)
]
TASKS: dict[str, dict[str, Any]] = {
    "multiple_choice": {
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 1,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "loglikelihood": {
        "doc_to_target": " {{choices[2]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "loglikelihood_rolling": {
        "doc_to_text": "",
        "doc_to_target": "{{q}} {{choices|join(' ')}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "generate_until": {
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["l"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch = tiny.arch("tied", vocab_size=800, max_position_embeddings=40)
    return quiz.write_tokenizer(tiny.write_model(tmp_path_factory.mktemp("model") / "hf", arch))


@pytest.fixture
def ours(process: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import contextlib

    from lm_eval.api.registry import get_model

    import qwen3_npu.evaluation.harness  # noqa: F401
    from qwen3_npu.distributed import launch

    monkeypatch.setattr(launch, "process_group", lambda platform, args: contextlib.nullcontext(process))
    made = get_model("qwen3-npu").create_from_arg_string(f"load={model},prefix_cache=true", {"device": "cpu"})
    yield made
    made.close()


def evaluated(lm: Any, folder: Path) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for kind, task in TASKS.items():
        common = {"task": f"our_{kind}", "output_type": kind, "dataset_path": "json", "test_split": "test"}
        common |= {"dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}}, "doc_to_text": "{{q}}"}
        (folder / f"{kind}.yaml").write_text(json.dumps({**common, **task}))
    return lm_eval.simple_evaluate(
        lm,
        tasks=[f"our_{kind}" for kind in TASKS],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )


def test_scores_are_those_of_the_harness_own_backend(ours: Any, model: Path, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    theirs = evaluated(HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=4, device="cpu"), tmp_path)
    found = evaluated(ours, tmp_path)
    for kind in TASKS:
        pairs = zip(theirs["samples"][f"our_{kind}"], found["samples"][f"our_{kind}"], strict=True)
        for expected, got in pairs:
            if kind == "generate_until":
                assert got["filtered_resps"] == expected["filtered_resps"]
            elif kind == "loglikelihood_rolling":
                assert got["filtered_resps"] == pytest.approx(expected["filtered_resps"], rel=1e-5)
            else:
                for (score, greedy), (said, flag) in zip(
                    got["filtered_resps"], expected["filtered_resps"], strict=True
                ):
                    assert score == pytest.approx(said, rel=1e-5)
                    assert greedy == flag
        numbers = {k: v for k, v in theirs["results"][f"our_{kind}"].items() if isinstance(v, float)}
        assert {k: found["results"][f"our_{kind}"][k] for k in numbers} == pytest.approx(numbers, rel=1e-5)
    greedy = ours.generate_until([type("R", (), {"args": (DOCS[0]["q"], {"until": [], "max_gen_toks": 3})})()])[0]
    context = DOCS[0]["q"]
    request = type("R", (), {"args": (context, greedy)})()
    assert ours.loglikelihood([request])[0][1], "what it says greedily is the likeliest"
