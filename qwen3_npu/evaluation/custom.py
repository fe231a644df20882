"""`--task custom`: the user's conversations with expected answers.

A record is a conversation in OpenAI's, ShareGPT's or Alpaca's form that ends with the expected answer, or has it in
"answer"; `--map-keys` renames columns and roles. "choices" (a list), "match" and "category" are optional.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from qwen3_npu.args.evaluation import MATCHES
from qwen3_npu.data.text.conversation import ASSISTANT, Conversation, Message, without_thought
from qwen3_npu.errors import UsageError
from qwen3_npu.inference.prompts import COLUMNS, conversation_of, read_records, waiting


class Case(NamedTuple):
    """One conversation and the expected answer.

    Attributes:
        prompt: the conversation up to the start of the answer.
        match: one of `MATCHES`.
        choices: choices of match "choice", and labels of the confusion table.
    """

    prompt: Conversation
    answer: str
    match: str
    choices: tuple[str, ...]
    category: str


def load_cases(path: str, match: str, most: int | None, keys: Mapping[str, object]) -> list[Case]:
    """The cases of a file.

    Args:
        keys: --map-keys.

    Raises:
        UsageError: the file or a record cannot be used.
    """
    mapped = [name for name in keys.values() if isinstance(name, str)]
    cases: list[Case] = []
    for where, record in read_records(path, "--task-data-path", (*COLUMNS, "match", "choices", "category", *mapped)):
        try:
            cases.append(_case(record, match, keys))
        except UsageError:
            raise
        except (ValueError, re.error) as error:
            raise UsageError(f"{where}: {error}") from None
        if len(cases) == most:
            break
    if not cases:
        raise UsageError(f"--task-data-path {path} holds no cases")
    return cases


def _case(record: Mapping[str, object], match: str, keys: Mapping[str, object]) -> Case:
    prompt, answer = _question_and_answer(record, keys)
    match = str(record.get("match", match))
    choices = record.get("choices") or ()
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"choices are not a list of texts but {repr(choices)[:60]}")
    if match not in MATCHES:
        raise ValueError(f"match {match!r} is none of {', '.join(MATCHES)}")
    if match == "choice" and answer not in choices:
        raise ValueError(f"the answer {answer!r} is none of the choices {list(choices)}")
    if match == "regex":
        re.compile(answer)
    return Case(prompt, answer, match, tuple(choices), category=str(record.get("category", "all")))


def _question_and_answer(record: Mapping[str, object], keys: Mapping[str, object]) -> tuple[Conversation, str]:
    conversation = conversation_of(record, keys)
    names = (str(keys.get("messages") or "messages"), "messages", "conversations")
    has_messages = any(isinstance(record.get(name), list) for name in names)
    response = str(keys.get("response") or "output")
    for column in ("answer",) if has_messages else (response, "output", "answer"):
        if record.get(column) is not None:
            return waiting(conversation), str(record[column])
    last = conversation.messages[-1] if conversation.messages else None
    if last is None or last.role != ASSISTANT:
        raise ValueError(
            "no answer: messages that end with the assistant's, or a column answer or output, are expected"
        )
    if not last.content:
        raise ValueError("the expected answer, the last message, has no text")
    return waiting(conversation._replace(messages=conversation.messages[:-1])), last.content


def is_right(case: Case, said: str) -> bool:
    """Whether a generated answer is the expected one; thoughts and surrounding spaces are ignored."""
    said, expected = plain(said), plain(case.answer)
    if case.match == "contains":
        return expected in said
    if case.match == "regex":
        return re.search(case.answer, said) is not None
    return said == expected


def plain(answer: str) -> str:
    """The part of an answer that is compared."""
    return without_thought(Message(ASSISTANT, answer)).content.strip()
