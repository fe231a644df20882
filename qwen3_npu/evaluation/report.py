"""Scores: per subject, category and total, with standard errors as lm-evaluation-harness pools them; files, tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

RESULTS = "results.json"
_CLOSE = 1e-3  # margins of log-likelihood below this are counted


class ScoredQuestion(NamedTuple):
    """One answered question.

    Attributes:
        scores: metric -> 1.0 or 0.0.
        margin: difference of log-likelihood between the two best choices; None without choices.
        log: the entry of --log-samples.
    """

    subject: str
    category: str
    scores: Mapping[str, float]
    margin: float | None
    log: Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class Score:
    """A mean over questions. `stderr` is None for a single question."""

    mean: float
    stderr: float | None
    count: int


def mean_score(values: Sequence[float]) -> Score:
    """Mean and its standard error (of the sample)."""
    count, mean = len(values), sum(values) / len(values)
    if count < 2:
        return Score(mean, None, count)
    return Score(mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1) / count), count)


def pooled(scores: Sequence[Score]) -> Score:
    """The mean over all questions of several subjects; variances are pooled, as lm-evaluation-harness does."""
    count = sum(s.count for s in scores)
    mean = sum(s.mean * s.count for s in scores) / count
    if len(scores) == 1:
        return scores[0]
    if count == len(scores) or any(s.stderr is None for s in scores):
        return Score(mean, None, count)
    variance = sum((s.count - 1) * (s.stderr or 0.0) ** 2 * s.count for s in scores) / (count - len(scores))
    return Score(mean, math.sqrt(variance / count), count)


class MetricScores(NamedTuple):
    """The scores of one metric."""

    subjects: Mapping[str, Score]
    categories: Mapping[str, Score]
    total: Score


class Summary:
    """The scores of one task.

    Attributes:
        metrics: metric -> its scores.
        ties, close: numbers of questions whose two best choices are equally likely, or nearly.
    """

    def __init__(self, samples: Sequence[ScoredQuestion]) -> None:
        self.metrics: dict[str, MetricScores] = {}
        for metric in samples[0].scores:
            subjects: dict[str, list[float]] = {}
            for sample in samples:
                subjects.setdefault(sample.subject, []).append(sample.scores[metric])
            scored = {subject: mean_score(values) for subject, values in subjects.items()}
            category = {sample.subject: sample.category for sample in samples}
            groups: dict[str, list[Score]] = {}
            for subject, score in scored.items():
                groups.setdefault(category[subject], []).append(score)
            categories = {name: pooled(scores) for name, scores in groups.items()}
            self.metrics[metric] = MetricScores(scored, categories, pooled(list(scored.values())))
        margins = [sample.margin for sample in samples if sample.margin is not None]
        self.compared = len(margins)
        self.ties, self.close = sum(m == 0 for m in margins), sum(m < _CLOSE for m in margins)

    def table(self, task: str) -> str:
        """A table: the first metric per subject, category and in total; further metrics in total."""
        first = next(iter(self.metrics))
        parts = self.metrics[first]
        rows = [*parts.subjects.items()] if len(parts.subjects) > 1 else []
        if len(parts.categories) > 1:
            rows += [(f"= {name}", score) for name, score in parts.categories.items()]
        rows += [(f"{task} {metric}", found.total) for metric, found in self.metrics.items()]
        width = max(len(name) for name, _ in rows)
        lines = [f"{'':<{width}}  questions  score %  stderr"]
        for name, score in rows:
            error = "     -" if score.stderr is None else f"{100 * score.stderr:6.2f}"
            lines.append(f"{name:<{width}}  {score.count:9}  {100 * score.mean:7.2f}  {error}")
        if self.compared:
            lines.append(f"ties: {self.ties} of {self.compared}; two best within {_CLOSE}: {self.close}")
        return "\n".join(lines)

    def json(self) -> dict[str, object]:
        """The entry of results.json."""
        metrics = {
            name: {
                "subjects": {subject: dataclasses.asdict(score) for subject, score in parts.subjects.items()},
                "categories": {category: dataclasses.asdict(score) for category, score in parts.categories.items()},
                "total": dataclasses.asdict(parts.total),
            }
            for name, parts in self.metrics.items()
        }
        return {"metrics": metrics, "ties": self.ties, f"margins_below_{_CLOSE}": self.close}


def confusion(pairs: Iterable[tuple[str, str]], most: int = 12) -> str:
    """Table of expected (rows) and given answers (columns); beyond `most` labels the rest is one column."""
    pairs = list(pairs)
    counts: dict[str, int] = {}
    for expected, _ in pairs:
        counts[expected] = counts.get(expected, 0) + 1
    labels = sorted(counts, key=lambda label: (-counts[label], label))[:most]
    other = "(other)"

    def label(text: str) -> str:
        return text if text in labels else other

    table: dict[tuple[str, str], int] = {}
    for expected, got in pairs:
        key = label(expected), label(got)
        table[key] = table.get(key, 0) + 1
    names = [*labels, other]
    short = [name if len(name) <= 14 else name[:13] + "~" for name in names]
    width = max(10, *map(len, short))
    lines = [f"{'expected':<{width}} | " + " ".join(f"{name:>{width}}" for name in short)]
    for name, shown in zip(names, short, strict=True):
        row = [table.get((name, column), 0) for column in names]
        if any(row):
            lines.append(f"{shown:<{width}} | " + " ".join(f"{n or '.':>{width}}" for n in row))
    return "\n".join(lines)
