"""Scores that are added up: the table of answers, and errors of pooled means."""

from __future__ import annotations

import pytest


def test_confusion_counts_every_answer_once() -> None:
    from qwen3_npu.evaluation.report import confusion

    lines = confusion([("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "what?")]).splitlines()
    assert [line.split() for line in lines] == [
        ["expected", "|", "no", "yes", "(other)"],
        ["no", "|", "1", ".", "1"],
        ["yes", "|", "1", "1", "."],
    ]


def test_pooled_errors_are_those_of_lm_evaluation_harness() -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics", reason="the comparison needs lm-evaluation-harness")
    from qwen3_npu.evaluation.report import mean_score, pooled

    values = [[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]]
    scores = [mean_score(v) for v in values]
    assert [s.stderr for s in scores] == pytest.approx([metrics.mean_stderr(v) for v in values])
    sizes = [len(v) for v in values]
    assert pooled(scores).stderr == pytest.approx(metrics.pooled_sample_stderr([s.stderr for s in scores], sizes))
    assert pooled(scores).mean == pytest.approx(sum(map(sum, values)) / sum(sizes))
