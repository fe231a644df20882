"""`--task custom`: conversations of one's own with expected answers.

A line is {"messages": [..], "answer": ".."}, messages that end with the assistant's expected answer, or
{"instruction": .., "input": .., "output": ..}. Also allowed: "choices" (a list), "match" and "category".
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from qwen3_npu.args.evaluation import MATCHES
from qwen3_npu.data.text.conversation import ASSISTANT, USER, Message
from qwen3_npu.errors import UsageError
from qwen3_npu.inference.prompts import messages_of


class Case(NamedTuple):
    """One conversation and what is expected.

    Attributes:
        match: of `MATCHES`.
        choices: of match "choice", and the labels of the confusion table.
    """

    messages: tuple[Message, ...]
    answer: str
    match: str
    choices: tuple[str, ...]
    category: str


def load_cases(path: str, match: str, most: int | None) -> list[Case]:
    """The cases of a .jsonl file.

    Raises:
        UsageError: the file or a line of it is not as it should be.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"--task-data-path {path}: a .jsonl file is expected for --task custom")
    cases = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            cases.append(_case(json.loads(line), match))
        except (ValueError, re.error) as error:
            raise UsageError(f"{path}, line {number}: {error}") from None
        if len(cases) == most:
            break
    if not cases:
        raise UsageError(f"--task-data-path {path} holds no cases")
    return cases


def _case(record: Any, match: str) -> Case:
    if not isinstance(record, dict):
        raise ValueError("an object is expected")
    messages, answer = _conversation(record)
    match = record.get("match", match)
    choices = tuple(record.get("choices") or ())
    if match not in MATCHES:
        raise ValueError(f"match {match!r} is none of {', '.join(MATCHES)}")
    if match == "choice" and answer not in choices:
        raise ValueError(f"the answer {answer!r} is none of the choices {list(choices)}")
    if match == "regex":
        re.compile(answer)
    return Case(messages, answer, match, choices, str(record.get("category", "all")))


def _conversation(record: dict[str, Any]) -> tuple[tuple[Message, ...], str]:
    if "messages" in record:
        listed = record["messages"]
        if "answer" in record:
            return messages_of(listed), str(record["answer"])
        last = listed[-1] if isinstance(listed, list) and listed else None
        if not isinstance(last, dict) or last.get("role") != ASSISTANT:
            raise ValueError("no answer, and the last message is not the assistant's")
        return messages_of(listed[:-1]), str(last["content"])
    asked, answer = record.get("instruction"), record.get("output", record.get("answer"))
    if not isinstance(asked, str) or answer is None:
        raise ValueError("messages and answer, or instruction and output, are expected")
    extra = record.get("input") or ""
    return (Message(USER, f"{asked}\n{extra}" if extra else asked),), str(answer)


def is_right(case: Case, said: str) -> bool:
    """Whether a generated answer is the expected one; spaces around do not count."""
    said, expected = said.strip(), case.answer.strip()
    if case.match == "contains":
        return expected in said
    if case.match == "regex":
        return re.search(case.answer, said) is not None
    return said == expected
