"""Tasks of lm-evaluation-harness that need no network, and a model's scores in them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import quiz

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
    "mmlu": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}" + "".join(f"\n{'ABCD'[i]}. {{{{options[{i}]}}}}" for i in range(4)) + "\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "generate_until": {
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["l"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def documents(folder: Path) -> list[dict[str, Any]]:
    """The texts, each with a question of a small MMLU."""
    if not (folder / "mmlu").exists():
        quiz.write_mmlu(folder / "mmlu", len(DOCS))
    rows = csv.reader((folder / "mmlu" / "test" / "anatomy_test.csv").open(newline=""))
    asked = [{"question": row[0], "options": row[1:5], "answer": "ABCD".index(row[5])} for row in rows]
    return [{**doc, **question} for doc, question in zip(DOCS, asked, strict=True)]


def evaluated(lm: Any, folder: Path) -> dict[str, Any]:
    """What lm-evaluation-harness says of a model in these tasks; the folder takes them."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in documents(folder)))
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


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Scores of every request, answers and metrics of two models are those of one."""
    for kind in TASKS:
        name = f"our_{kind}"
        for got, said in zip(found["samples"][name], expected["samples"][name], strict=True):
            if kind == "generate_until":
                assert got["filtered_resps"] == said["filtered_resps"]
            elif kind == "loglikelihood_rolling":
                assert got["filtered_resps"] == pytest.approx(said["filtered_resps"], rel=1e-5)
            else:
                for one, other in zip(got["filtered_resps"], said["filtered_resps"], strict=True):
                    assert one[0] == pytest.approx(other[0], rel=1e-5)
                    assert one[1] == other[1], "whether it is the likeliest continuation"
        numbers = {k: v for k, v in expected["results"][name].items() if isinstance(v, float)}
        assert {k: found["results"][name][k] for k in numbers} == pytest.approx(numbers, rel=1e-5)


def of_transformers(model: Path, folder: Path) -> dict[str, Any]:
    """What the harness' own Hugging Face backend scores."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    return evaluated(HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=4, device="cpu"), folder)
