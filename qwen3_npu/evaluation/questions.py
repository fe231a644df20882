"""Questions of a benchmark's files. Every cell is text: "None" and "NA" are answers."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from qwen3_npu.errors import UsageError, did_you_mean
from qwen3_npu.evaluation.task import LETTERS, LIKELIHOOD, Task

QuestionColumns = dict[str, str]


class Question(NamedTuple):
    """One question.

    Attributes:
        number: its index in the subject.
        columns: columns of the file, with the task's names.
        examples: questions with answers to show before it.
        gold: index of the right choice; -1 for tasks without choices.
    """

    subject: str
    number: int
    columns: QuestionColumns
    examples: tuple[QuestionColumns, ...]
    gold: int


def load_questions(
    task: Task, path: str, *, shots: int | None, most: int | None, subjects: Sequence[str] | None
) -> list[Question]:
    """All questions of a task, subject by subject.

    Args:
        path: --task-data-path: the folder of the files, or one above it.
        shots: number of examples; None: the task's default.
        most: maximum number of questions of each subject; None: all.
        subjects: the subjects to read; None: all that have files.

    Raises:
        UsageError: files are missing or cannot be used.
    """
    root = Path(path)
    if unknown := [name for name in subjects or () if name not in task.subjects]:
        raise UsageError(
            f"--subjects {unknown[0]}: {task.name} has no such subject{did_you_mean(unknown[0], task.subjects)}"
        )
    shots = task.shots if shots is None else shots
    found: list[Question] = []
    missing = []
    for subject in subjects or task.subjects:
        file = _find(root, task.test, subject)
        if file is None:
            missing.append(subject)
            continue
        rows = _read(file, task)
        examples = _examples(task, root, file, subject, shots=shots)
        for number, row in enumerate(rows[:most]):
            try:
                gold = task.choices.index(row["answer"]) if task.method == LIKELIHOOD else -1
            except ValueError:
                raise UsageError(
                    f"{file}, question {number + 1}: the answer {row['answer']!r} is none of {', '.join(task.choices)}"
                ) from None
            found.append(Question(subject, number, row, examples(row), gold=gold))
    if not found or (subjects and missing):
        name = task.test[0].format(subject=(missing or ["*"])[0])
        raise UsageError(
            f"--task-data-path {path}: {name} for --task {task.name} is neither in that folder nor in a folder below"
        )
    return found


def missing_subjects(task: Task, questions: Iterable[Question]) -> list[str]:
    """Subjects of the task without questions."""
    there = {question.subject for question in questions}
    return [subject for subject in task.subjects if subject not in there]


def _find(root: Path, names: Sequence[str], subject: str) -> Path | None:
    """Find a file in the folder, in its subfolders of test data, or (for examples) beside the folder."""
    folders = [root, *(root / name for name in ("test", "val", "dev", "data", "data/test", "data/val", "data/dev"))]
    folders += [root.parent / "dev", root.parent]
    for name in names:
        for folder in folders:
            if folder.is_dir() and (files := sorted(folder.glob(name.format(subject=subject)))):
                return files[0]
    return None


def _examples(
    task: Task, root: Path, test: Path, subject: str, *, shots: int
) -> Callable[[QuestionColumns], tuple[QuestionColumns, ...]]:
    """A function that gives the examples of the next question."""
    if not shots:
        return lambda row: ()
    file = _find(root, task.examples, subject)
    if file is None or file == test:
        name = task.examples[0].format(subject=subject)
        raise UsageError(
            f"--task-data-path {root}: no {name} to take {shots} examples from; add it or give --num-fewshot 0"
        )
    rows = _read(file, task)
    if len(rows) < shots + task.spare:
        spare = " (one more is drawn, as lm-evaluation-harness does)" if task.spare else ""
        raise UsageError(f"--num-fewshot {shots}: {file} has {len(rows)} examples{spare}")
    if task.drawn is None:
        first = tuple(rows[:shots])
        return lambda row: first
    generator = random.Random(task.drawn)

    def draw(row: QuestionColumns) -> tuple[QuestionColumns, ...]:
        if not task.spare:
            return tuple(generator.sample(rows, shots))
        drawn = [example for example in generator.sample(rows, shots + 1) if example != row][:shots]
        if len(drawn) < shots:  # the question is among the examples more than once
            drawn = generator.sample([example for example in rows if example != row], shots)
        return tuple(drawn)

    return draw


def _read(file: Path, task: Task) -> list[QuestionColumns]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            if file.suffix == ".jsonl":
                records = [json.loads(line) for line in stream if line.strip()]
                rows = [{name: _text(value) for name, value in record.items()} for record in records]
            elif task.columns is not None:
                rows = [dict(zip(task.columns, row, strict=True)) for row in csv.reader(stream) if row]
            else:
                rows = [{name: value or "" for name, value in row.items() if name} for row in csv.DictReader(stream)]
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{file} cannot be read as a file of {task.name}: {error}") from None
    rows = [{task.rename.get(name, name): value for name, value in row.items()} for row in rows]
    for number, row in enumerate(rows, start=1):
        if lacking := [name for name in ("question", "answer") if name not in row]:
            raise UsageError(f"{file}, question {number}: no column {lacking[0]} (there are {', '.join(row)})")
        row["question"] = row["question"].strip() if task.choices == LETTERS else row["question"]
        row["answer"] = task.answers.get(row["answer"], row["answer"])
    return rows


def _text(value: object) -> str:
    return value if isinstance(value, str) else str(value)
