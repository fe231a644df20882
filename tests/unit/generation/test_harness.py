"""lm-evaluation-harness with our engine as its model: the scores of its own Hugging Face backend."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import harness_tasks
import quiz
import tiny

pytest.importorskip("lm_eval", reason="the comparison needs lm-evaluation-harness (pip install lm-eval)")


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


def test_scores_are_those_of_the_harness_own_backend(ours: Any, model: Path, tmp_path: Path) -> None:
    found = harness_tasks.evaluated(ours, tmp_path)
    harness_tasks.assert_same(found, harness_tasks.of_transformers(model, tmp_path))
    greedy = ours.generate_until(
        [type("R", (), {"args": (harness_tasks.DOCS[0]["q"], {"until": [], "max_gen_toks": 3})})()]
    )[0]
    context = harness_tasks.DOCS[0]["q"]
    request = type("R", (), {"args": (context, greedy)})()
    assert ours.loglikelihood([request])[0][1], "what it says greedily is the likeliest"


def test_the_command_is_that_of_the_harness(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `python -m` runs it: the model is registered once, however the module is called."""
    monkeypatch.setattr(sys, "argv", ["harness", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("qwen3_npu.evaluation.harness", run_name="__main__")
    assert not end.value.code
    assert "--model_args" in capsys.readouterr().out
