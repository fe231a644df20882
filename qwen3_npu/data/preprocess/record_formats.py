"""Records of the common formats -> conversations. `--map-keys` names columns and roles that are called otherwise.

Columns and their defaults are MindSpeed-LLM's (and LLaMA-Factory's).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qwen3_npu.data.preprocess.pretrain_handler import text_value, value
from qwen3_npu.data.text.conversation import (
    ASSISTANT,
    SYSTEM,
    TOOL,
    USER,
    Conversation,
    Message,
    Pair,
    calls_of,
    checked,
    to_json,
    tools_of,
    written_calls,
)
from qwen3_npu.errors import UsageError, did_you_mean

Names = Mapping[str, str | None]

ALPACA: Names = {"prompt": "instruction", "query": "input", "response": "output", "history": None, "system": None}
ALPACA_PAIRS: Names = {**ALPACA, "chosen": "chosen", "rejected": "rejected"}
SHAREGPT: Names = {"messages": "conversations", "system": None, "tools": None}
SHAREGPT_PAIRS: Names = {**SHAREGPT, "chosen": "chosen", "rejected": "rejected"}
OPENAI: Names = {"messages": "messages", "system": None, "tools": "tools"}
_OPTIONAL = {"query", "history", "system", "tools"}

TAGS: Names = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
# Columns and keys that would change the conversation, if they were read: those of a record, and those of a message.
_TELLING = ("system", "history", "tools", "reasoning_content", "thinking", "reasoning")
_TELLING_KEYS = ("reasoning", "thinking", "thought", "thoughts")


class Columns:
    """What the columns (and for ShareGPT the roles) of a record are called.

    Attributes:
        names: meaning -> column; None or "" if there is none.
        tags: likewise for the keys and roles of messages.
    """

    def __init__(self, defaults: Names, map_keys: Mapping[str, Any] | None, *, has_tags: bool = False) -> None:
        """Raises: UsageError: --map-keys maps what these records do not have."""
        given = dict(map_keys or {})
        tags = given.pop("tags", None) if has_tags else None
        for name, column in given.items():
            if name not in defaults:
                known = [*defaults, *(["tags"] if has_tags else [])]
                raise UsageError(
                    f"--map-keys: these records have no {name!r}; known: {', '.join(known)}{did_you_mean(name, known)}"
                )
            if column is not None and not isinstance(column, str):
                raise UsageError(f"--map-keys: {name!r} must be mapped to a column's name, not to {column!r}")
        self.names: Names = {**defaults, **given}
        self.mapped = frozenset(given)
        self.telling = {name: None for name in _TELLING if name not in self.names.values()}.keys()
        self.tags: Names = TAGS if tags is None else self._tags(tags)

    @staticmethod
    def _tags(given: Any) -> Names:
        # As in MindSpeed-LLM: once tags are given, those not mentioned do not exist.
        if not isinstance(given, dict) or (unknown := [t for t in given if t not in TAGS]):
            what = f"tags have no {unknown[0]!r}" if isinstance(given, dict) else "tags must be an object"
            raise UsageError(f"--map-keys: {what}; known: {', '.join(TAGS)}")
        if missing := [tag for tag in ("role_tag", "content_tag", "user_tag", "assistant_tag") if not given.get(tag)]:
            raise UsageError(f"--map-keys: tags lack {', '.join(missing)}")
        return {tag: given.get(tag) for tag in TAGS}

    def all(self) -> list[str]:
        """Every column to read, with those that are only looked at."""
        return [*filter(None, self.names.values()), *_TELLING]

    def unused(self, record: Mapping[str, Any]) -> list[str]:
        """What a record holds, but the conversation made of it lacks; for telling the user."""
        found = []
        if not self.telling.isdisjoint(record):  # seldom, and this is asked of every record
            found = [f"column {name!r}" for name in self.telling if record.get(name)]
        messages = record.get(self.names.get("messages") or "")
        if isinstance(messages, list):
            keys = {key for m in messages if isinstance(m, dict) for key in _TELLING_KEYS if m.get(key)}
            found += [f"message key {key!r} (thoughts are read from 'reasoning_content')" for key in sorted(keys)]
        return found

    def get(self, record: Mapping[str, Any], name: str) -> Any:
        """The value with this meaning; None if there is none.

        Raises:
            ValueError: a column that is required, or was named in --map-keys, is missing.
        """
        column = self.names.get(name)
        if not column:
            return None
        found = record.get(column)
        if found is None and column not in record and (name in self.mapped or name not in _OPTIONAL):
            return value(record, column)  # says what is there
        return found

    def text(self, record: Mapping[str, Any], name: str) -> str:
        """Likewise, as text; empty if there is none."""
        text = self.get(record, name)
        if text is None:
            return ""
        if isinstance(text, str):
            return text
        raise ValueError(f"column {self.names[name]!r} is not text but {type(text).__name__}")


def alpaca(record: Mapping[str, Any], columns: Columns) -> Conversation:
    """Instruction, input, output; earlier turns in `history`."""
    answer = columns.get(record, "response")
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(answer, str):
        raise ValueError(f"column {columns.names['response']!r} is no answer but {_kind(answer)}")
    return _alpaca(record, columns, Message(ASSISTANT, answer))


def alpaca_pair(record: Mapping[str, Any], columns: Columns) -> Pair:
    """As `alpaca`, with two answers."""
    chosen, rejected = columns.get(record, "chosen"), columns.get(record, "rejected")
    if isinstance(chosen, list) and isinstance(rejected, list) and chosen and rejected:
        chosen, rejected = chosen[0], rejected[-1]  # both columns may hold [good, bad]
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise ValueError(f"chosen and rejected are not two answers but {_kind(chosen)} and {_kind(rejected)}")
    return Pair(_alpaca(record, columns), Message(ASSISTANT, chosen), Message(ASSISTANT, rejected))


def _alpaca(record: Mapping[str, Any], columns: Columns, *answer: Message) -> Conversation:
    messages: list[Message] = []
    for turn in columns.get(record, "history") or ():
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise ValueError("history is not a list of [question, answer]")
        messages += [Message(USER, turn[0]), Message(ASSISTANT, turn[1])]
    question = "\n".join(filter(None, (columns.text(record, "prompt"), columns.text(record, "query"))))
    return Conversation((*messages, Message(USER, question), *answer), columns.text(record, "system"))


def sharegpt(record: Mapping[str, Any], columns: Columns) -> Conversation:
    """Turns of two sides; a system message may come first."""
    conversation = _sharegpt_turns(record, columns)
    if len(conversation.messages) % 2:
        raise ValueError(f"{len(conversation.messages)} messages; questions and answers must alternate, an answer last")
    return checked(conversation)


def sharegpt_pair(record: Mapping[str, Any], columns: Columns) -> Pair:
    """As `sharegpt` up to a question, with two answers."""
    prompt = _sharegpt_turns(record, columns)
    if len(prompt.messages) % 2 == 0:
        raise ValueError(f"{len(prompt.messages)} messages; a question must come last")
    answers = []
    for name in ("chosen", "rejected"):
        answer = columns.get(record, name)
        if not isinstance(answer, dict):
            raise ValueError(f"column {columns.names[name]!r} is not a message but {_kind(answer)}")
        answers.append(_sharegpt_message(answer, 1, columns.tags))
    return Pair(prompt, *answers)


def _sharegpt_turns(record: Mapping[str, Any], columns: Columns) -> Conversation:
    messages, tags = columns.get(record, "messages"), columns.tags
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"column {columns.names['messages']!r} is not a list of messages but {_kind(messages)}")
    system = columns.text(record, "system")
    if tags["system_tag"] and messages[0].get(tags["role_tag"]) == tags["system_tag"]:
        system, messages = text_value(messages[0], str(tags["content_tag"])), messages[1:]
    turns = tuple(_sharegpt_message(message, i, tags) for i, message in enumerate(messages))
    return Conversation(turns, system, tools_of(columns.get(record, "tools")))


def _sharegpt_message(message: Mapping[str, Any], place: int, tags: Names) -> Message:
    """The message at an even place is asked, at an odd place answered."""
    role = message.get(str(tags["role_tag"]))
    asked = {tags["user_tag"]: USER, tags["observation_tag"]: TOOL}
    answered = {tags["assistant_tag"]: ASSISTANT, tags["function_tag"]: "function"}
    expected = answered if place % 2 else asked
    if role is None or role not in expected:
        names = " or ".join(repr(name) for name in expected if name)
        raise ValueError(f"message {place + 1} is from {role!r}, where {names} is expected")
    content = value(message, str(tags["content_tag"]))
    if not isinstance(content, str):
        content = to_json(content)
    if expected[role] == "function":
        reasoning, calls = written_calls(content)
        return Message(ASSISTANT, "", reasoning, calls)
    return Message(expected[role], content)


def openai(record: Mapping[str, Any], columns: Columns) -> Conversation:
    """Messages with role, content, reasoning_content and tool_calls, in any order that starts with a question."""
    messages = columns.get(record, "messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"column {columns.names['messages']!r} is not a list of messages but {_kind(messages)}")
    read = [_openai_message(message, i) for i, message in enumerate(messages, start=1)]
    system = columns.text(record, "system")
    if read[0].role == SYSTEM:
        system, read = read[0].content, read[1:]
    return checked(Conversation(tuple(read), system, tools_of(columns.get(record, "tools"))))


def _openai_message(message: Mapping[str, Any], place: int) -> Message:
    role = message.get("role")
    if role not in (SYSTEM, USER, ASSISTANT, TOOL):
        raise ValueError(f"message {place} has role {role!r}; known: system, user, assistant, tool")
    content, reasoning, calls = message.get("content"), message.get("reasoning_content"), message.get("tool_calls")
    if isinstance(content, list):
        content, parts_reasoning, parts_calls = _content_parts(content, place)
        reasoning, calls = reasoning or parts_reasoning, calls or parts_calls
    if content is None and role == ASSISTANT:
        content = ""
    if not isinstance(content, str) or not isinstance(reasoning, str | None):
        raise ValueError(f"message {place} has no text as content but {_kind(content)}")
    if role != ASSISTANT:
        return Message(role, content)
    return Message(role, content, reasoning or None, calls_of(calls) if calls else (), _learned(message, place))


def _content_parts(parts: list[Any], place: int) -> tuple[str, str | None, list[Any]]:
    """Content in typed parts -> (text, reasoning, calls)."""
    texts: dict[str, list[str]] = {"text": [], "reasoning": [], "tool_call": []}
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(kind) or part.get("value") if kind in texts else None
        if not isinstance(text, str):
            raise ValueError(f"message {place} has content that is no text: {repr(part)[:80]}")
        texts[str(kind)].append(text)
    try:
        calls = [json.loads(text) for text in texts["tool_call"]]
    except ValueError as error:
        raise ValueError(f"message {place}: a function call is not JSON: {error}") from None
    return "".join(texts["text"]), "".join(texts["reasoning"]) or None, calls


def _learned(message: Mapping[str, Any], place: int) -> bool:
    weight = message.get("loss_weight", 1.0)
    if weight not in (None, 0, 1):
        raise ValueError(f"message {place} has loss_weight {weight!r}; only 0 and 1 can be written")
    return weight != 0


def _kind(found: Any) -> str:
    return "nothing" if found is None else f"{type(found).__name__} {repr(found)[:40]}"
