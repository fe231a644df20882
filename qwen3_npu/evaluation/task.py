"""The description of a benchmark: its files, the form of its questions, the right answers. Data, no code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

LIKELIHOOD, GENERATE = "likelihood", "generate"
LETTERS = ("A", "B", "C", "D")


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of questions in one language; {name} is a column of the question.

    Attributes:
        description: text before the examples; {subject} is the subject's name in that language.
        question: a question without its answer.
    """

    description: str
    question: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One benchmark.

    Attributes:
        version: changes when scores are no longer comparable.
        subjects: name -> (category, name as it is written in each language).
        texts: language -> texts; the first language is the default.
        columns: of the files, if they have no header.
        rename: column of the files -> name here; question and answer are needed.
        test, examples: names of files, in the order of the search.
        method: `LIKELIHOOD` of the choices, or `GENERATE` and extract.
        choices: the texts that are scored (and the values of `answer` that mean them), for `LIKELIHOOD` tasks.
        answers: column value -> choice, if they differ.
        shots: default number of examples before each question.
        drawn: examples are drawn for each question by Python's generator with this seed; None: the first ones.
        spare: draw one example more, in case the question itself is among them (lm-evaluation-harness does so if a
            task has no split for examples).
        stop, limit: of `GENERATE` tasks: texts that end an answer, and its tokens.
        filters: of `GENERATE` tasks: name -> (expression that finds the answer, which match).
    """

    name: str
    version: str
    subjects: Mapping[str, tuple[str, Mapping[str, str]]]
    texts: Mapping[str, Texts]
    columns: tuple[str, ...] | None = None
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    test: tuple[str, ...]
    examples: tuple[str, ...]
    method: str = LIKELIHOOD
    choices: tuple[str, ...] = LETTERS
    answers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shots: int
    drawn: int | None = None
    spare: bool = False
    stop: tuple[str, ...] = ()
    limit: int = 256
    filters: Mapping[str, tuple[str, int]] = dataclasses.field(default_factory=dict)


def english(category: str, names: str) -> dict[str, tuple[str, dict[str, str]]]:
    """Subjects of a category whose names are written with spaces for underscores."""
    return {name: (category, {"en": name.replace("_", " ")}) for name in names.split()}


def chinese(category: str, names: str) -> dict[str, tuple[str, dict[str, str]]]:
    """Subjects of a category as `name=Chinese name`, with spaces between."""
    pairs = (pair.split("=") for pair in names.split())
    return {name: (category, {"zh": written, "en": name.replace("_", " ")}) for name, written in pairs}
