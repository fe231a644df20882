"""Records of the common formats -> conversations. `--map-keys` renames columns and roles.

Columns and their defaults are MindSpeed-LLM's (and LLaMA-Factory's).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from qwen3_npu.data.text.conversation import (
    ASSISTANT,
    TOOL,
    USER,
    Conversation,
    Judged,
    Message,
    PreferencePair,
    checked_conversation,
    to_json,
    tools_of,
    written_calls,
)
from qwen3_npu.data.text.messages import LEARN_KEYS, MASK_KEYS, REASONING, is_left_out, kind, learned, read_messages
from qwen3_npu.errors import UsageError, did_you_mean

ColumnNames = Mapping[str, str | None]

ALPACA: ColumnNames = {"prompt": "instruction", "query": "input", "response": "output", "history": None, "system": None}
ALPACA_PAIRS: ColumnNames = {**ALPACA, "chosen": "chosen", "rejected": "rejected"}
ALPACA_KTO: ColumnNames = {**ALPACA, "label": "label"}
SHAREGPT: ColumnNames = {"messages": "conversations", "system": None, "tools": None}
SHAREGPT_PAIRS: ColumnNames = {**SHAREGPT, "chosen": "chosen", "rejected": "rejected"}
SHAREGPT_KTO: ColumnNames = {**SHAREGPT, "label": "label"}
OPENAI: ColumnNames = {"messages": "messages", "system": None, "tools": "tools"}
OPENAI_KTO: ColumnNames = {**OPENAI, "label": "label"}
# Text of a label -> whether the answer is desirable.
_LABELS = {"true": True, "1": True, "desirable": True, "false": False, "0": False, "undesirable": False}
# Names that other programs give to columns, for a hint.
_ALIASES = {
    "prompt": ("prompt", "question", "query", "input", "user"),
    "response": ("response", "answer", "completion", "target", "chosen", "text"),
    "chosen": ("chosen", "response", "answer"),
    "rejected": ("rejected", "reject", "rejected_response"),
    "label": ("label", "kto_tag", "desirable", "feedback", "thumbs_up"),
    "messages": ("messages", "conversations", "conversation", "dialog", "dialogue", "chat"),
}
_OPTIONAL = {"query", "history", "system", "tools"}

TAGS: ColumnNames = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
# Columns that would change the conversation if they were used.
_TELLING = ("system", "history", "tools", *REASONING)
# Keys that say where a record or message comes from; they hold nothing that could be learned.
_METADATA = frozenset(
    re.findall(
        r"\w+",
        """
        id idx index uuid key hash source sources origin dataset dataset_name data_source subset split category
        categories topic topics subject domain task task_type type kind lang language tags labels meta metadata info
        extra url urls date time timestamp created created_at updated_at version license author user user_id model
        model_name generator generated_by score scores rating quality difficulty length num_tokens n_tokens tokens
        num_turns turns turn conversation_id chat_id session_id message_id parent_id node_id tree_id name
        tool_call_id
        """,
    )
)
_MESSAGE_KEYS = frozenset(("role", "content", "tool_calls", "function_call", *REASONING, *LEARN_KEYS, *MASK_KEYS))


def _says(value: object) -> bool:
    """Whether there is a value; 0 and false count as values."""
    return value is not None and value not in ("", [], {})


def missing_column(record: Mapping[str, object], column: str) -> str:
    """The message for a missing column, with the existing ones."""
    text = f"no column {column!r}; there is {', '.join(map(repr, record)) or 'none'}"
    for key, found in record.items():
        if isinstance(found, list) and found and isinstance(found[0], dict) and column in found[0]:
            return f"{text}; the records are inside {key!r}: jq -c '.[{json.dumps(key)}][]' OLD > NEW.jsonl"
    return text


def value(record: Mapping[str, object], column: str) -> object:
    """A column of a record. Raises: ValueError: the record has none, or nothing in it."""
    if column not in record:
        raise ValueError(missing_column(record, column))
    if record[column] is None:
        raise ValueError(f"column {column!r} is null")
    return record[column]


def text_value(record: Mapping[str, object], column: str) -> str:
    """A column of text. Raises: ValueError: as `value`, or it is no text."""
    text = value(record, column)
    if not isinstance(text, str):
        raise ValueError(f"column {column!r} is not text but {type(text).__name__}")
    return text


class Columns:
    """The names of a record's columns (and for ShareGPT of its roles).

    Attributes:
        names: meaning -> column; None or "" if there is none.
        tags: the same for the keys and roles of messages.
    """

    def __init__(self, defaults: ColumnNames, map_keys: Mapping[str, object] | None, *, has_tags: bool = False) -> None:
        """Raises: UsageError: --map-keys names something that these records do not have."""
        given = dict(map_keys or {})
        tags = given.pop("tags", None) if has_tags else None
        names: dict[str, str | None] = {}
        for name, column in given.items():
            if name not in defaults:
                known = [*defaults, *(["tags"] if has_tags else [])]
                raise UsageError(
                    f"--map-keys: these records have no {name!r}; known: {', '.join(known)}{did_you_mean(name, known)}"
                )
            if column is not None and not isinstance(column, str):
                raise UsageError(f"--map-keys: {name!r} must be mapped to a column's name, not to {column!r}")
            names[name] = column
        self.names: ColumnNames = {**defaults, **names}
        self.mapped = frozenset(given)
        self.telling = {name: None for name in _TELLING if name not in self.names.values()}.keys()
        self.says_learned = {*LEARN_KEYS, *MASK_KEYS} - set(self.names.values())
        self.tags: ColumnNames = TAGS if tags is None else self._tags(tags)
        own = (self.tags["role_tag"], self.tags["content_tag"]) if has_tags else _MESSAGE_KEYS
        self.telling_keys = tuple(key for key in (*REASONING, "thought", "thoughts") if key not in own)
        self.message_keys = {*self.telling_keys, *filter(None, own), *LEARN_KEYS, *MASK_KEYS}

    @staticmethod
    def _tags(given: object) -> ColumnNames:
        # As in MindSpeed-LLM: once tags are given, those not mentioned do not exist.
        if not isinstance(given, dict) or (unknown := [t for t in given if t not in TAGS]):
            what = f"tags have no {unknown[0]!r}" if isinstance(given, dict) else "tags must be an object"
            raise UsageError(f"--map-keys: {what}; known: {', '.join(TAGS)}")
        if missing_column := [
            tag for tag in ("role_tag", "content_tag", "user_tag", "assistant_tag") if not given.get(tag)
        ]:
            raise UsageError(f"--map-keys: tags lack {', '.join(missing_column)}")
        return {tag: given.get(tag) for tag in TAGS}

    def all(self) -> list[str]:
        """Every column to read, also those that are only checked."""
        return [*filter(None, self.names.values()), *_TELLING, *LEARN_KEYS, *MASK_KEYS]

    def leaves_out(self, record: Mapping[str, object]) -> bool:
        """Whether a key beside the messages excludes the whole record from training; see `is_left_out`."""
        if self.says_learned.isdisjoint(record):  # seldom, and this is asked of every record
            return False
        return is_left_out({key: record[key] for key in self.says_learned & record.keys()})

    def unused(self, record: Mapping[str, object]) -> list[str]:
        """Columns that would change the conversation of a record but are not read, for a message."""
        found = []
        if not self.telling.isdisjoint(record):  # seldom, and this is asked of every record
            found = [f"column {name!r}" for name in self.telling if record.get(name)]
        messages = record.get(self.names.get("messages") or "")
        if isinstance(messages, list):
            keys = {key for m in messages if isinstance(m, dict) for key in self.telling_keys if m.get(key)}
            found += [f"message key {key!r} (thoughts are read from 'reasoning_content')" for key in sorted(keys)]
        return found

    def unknown(self, record: Mapping[str, object]) -> list[str]:
        """Keys of a record and its messages that are neither read nor known as metadata, for --check."""
        read = {*filter(None, self.names.values()), *self.telling, *_METADATA}
        found = [
            f"key {key!r} of a record is not used" for key, value in record.items() if key not in read and _says(value)
        ]
        messages = record.get(self.names.get("messages") or "")
        read = {*self.message_keys, *_METADATA}
        for message in messages if isinstance(messages, list) else ():
            keys = message if isinstance(message, dict) else {}
            found += [f"key {key!r} of a message is not used" for key in keys if key not in read and _says(keys[key])]
        return found

    def get(self, record: Mapping[str, object], name: str) -> object:
        """The value with this meaning; None if there is none.

        Raises:
            ValueError: a column that is required, or was named in --map-keys, is missing.
        """
        column = self.names.get(name)
        if not column:
            return None
        found = record.get(column)
        if found is None and column not in record and (name in self.mapped or name not in _OPTIONAL):
            raise ValueError(f"{missing_column(record, column)}; {self._remedy(record, name)}")
        return found

    def _remedy(self, record: Mapping[str, object], name: str) -> str:
        """The remedy for a missing column: a --map-keys that renames it."""
        others = [key for key in record if key not in self.names.values() and isinstance(key, str)]
        likely = next((key for key in _ALIASES.get(name, ()) if key in others), None) or "COLUMN"
        return f"if it is called otherwise, --map-keys '{json.dumps({name: likely}, ensure_ascii=False)}'"

    def optional_text(self, record: Mapping[str, object], name: str) -> str | None:
        """The value as text. Raises: ValueError: see `get`; or it is no text."""
        text = self.get(record, name)
        if text is None or isinstance(text, str):
            return text
        raise ValueError(f"column {self.names[name]!r} is not text but {type(text).__name__}")

    def text(self, record: Mapping[str, object], name: str) -> str:
        """The value as text; empty if there is none."""
        return self.optional_text(record, name) or ""


def alpaca(record: Mapping[str, object], columns: Columns) -> Conversation:
    """Instruction, input, output; earlier turns in `history`."""
    answer = columns.get(record, "response")
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(answer, str):
        raise ValueError(f"column {columns.names['response']!r} is no answer but {kind(answer)}")
    return alpaca_turns(record, columns, Message(ASSISTANT, answer))


def alpaca_pair(record: Mapping[str, object], columns: Columns) -> PreferencePair:
    """As `alpaca`, with two answers."""
    chosen, rejected = columns.get(record, "chosen"), columns.get(record, "rejected")
    if isinstance(chosen, list) and isinstance(rejected, list) and chosen and rejected:
        chosen, rejected = chosen[0], rejected[-1]  # both columns may hold [good, bad]
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise ValueError(f"chosen and rejected are not two answers but {kind(chosen)} and {kind(rejected)}")
    return PreferencePair(alpaca_turns(record, columns), Message(ASSISTANT, chosen), Message(ASSISTANT, rejected))


def alpaca_turns(record: Mapping[str, object], columns: Columns, *answer: Message) -> Conversation:
    """The turns of `history`, then instruction and input, then the given answers."""
    messages: list[Message] = []
    history = columns.get(record, "history") or []
    for turn in history if isinstance(history, list) else (history,):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise ValueError("history is not a list of [question, answer]")
        messages += [Message(USER, turn[0]), Message(ASSISTANT, turn[1])]
    question = "\n".join(filter(None, (columns.text(record, "prompt"), columns.text(record, "query"))))
    return Conversation((*messages, Message(USER, question), *answer), columns.optional_text(record, "system"))


def sharegpt(record: Mapping[str, object], columns: Columns) -> Conversation:
    """Turns of two sides; a system message may come first."""
    conversation = sharegpt_turns(record, columns)
    if len(conversation.messages) % 2:
        raise ValueError(f"{len(conversation.messages)} messages; questions and answers must alternate, an answer last")
    return checked_conversation(conversation)


def sharegpt_pair(record: Mapping[str, object], columns: Columns) -> PreferencePair:
    """As `sharegpt` up to a question, with two answers."""
    prompt = sharegpt_turns(record, columns)
    if len(prompt.messages) % 2 == 0:
        raise ValueError(f"{len(prompt.messages)} messages; a question must come last")
    answers = []
    for name in ("chosen", "rejected"):
        answer = columns.get(record, name)
        if not isinstance(answer, dict):
            raise ValueError(f"column {columns.names[name]!r} is not a message but {kind(answer)}")
        answers.append(_sharegpt_message(answer, 1, columns.tags))
    return PreferencePair(prompt, *answers)


def sharegpt_turns(record: Mapping[str, object], columns: Columns) -> Conversation:
    """Turns of two sides; either side may be last."""
    messages, tags = columns.get(record, "messages"), columns.tags
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"column {columns.names['messages']!r} is not a list of messages but {kind(messages)}")
    system = columns.optional_text(record, "system")
    if tags["system_tag"] and messages[0].get(tags["role_tag"]) == tags["system_tag"]:
        system, messages = text_value(messages[0], str(tags["content_tag"])), messages[1:]
    turns = tuple(_sharegpt_message(message, i, tags) for i, message in enumerate(messages))
    return Conversation(turns, system, tools_of(columns.get(record, "tools")))


def _sharegpt_message(message: Mapping[str, object], place: int, tags: ColumnNames) -> Message:
    """A message: a question at an even place, an answer at an odd place."""
    role = message.get(str(tags["role_tag"]))
    asked = {tags["user_tag"]: USER, tags["observation_tag"]: TOOL}
    answered = {tags["assistant_tag"]: ASSISTANT, tags["function_tag"]: "function"}
    expected = answered if place % 2 else asked
    if role is None or role not in expected:
        names = " or ".join(repr(name) for name in expected if name)
        raise ValueError(f"message {place + 1} is from {role!r}, where {names} is expected")
    content, chosen = value(message, str(tags["content_tag"])), learned(message, place + 1)
    if not isinstance(content, str):
        content = to_json(content)
    if expected[role] == "function":
        reasoning, calls = written_calls(content)
        return Message(ASSISTANT, "", reasoning, calls, learned=chosen)
    return Message(expected[role], content, learned=chosen)


def openai(record: Mapping[str, object], columns: Columns) -> Conversation:
    """Messages with role, content, reasoning_content and tool_calls, in any order that starts with a question."""
    messages = columns.get(record, "messages")
    system = columns.optional_text(record, "system")
    return checked_conversation(read_messages(messages, columns.get(record, "tools"), system))


def judged(
    read: Callable[[Mapping[str, object], Columns], Conversation],
) -> Callable[[Mapping[str, object], Columns], Judged]:
    """A reader of labelled conversations, made from a reader of conversations."""

    def read_judged(record: Mapping[str, object], columns: Columns) -> Judged:
        label = columns.get(record, "label")
        text = str(int(label) if isinstance(label, float) and label.is_integer() else label).strip().lower()
        if text not in _LABELS:
            raise ValueError(
                f"column {columns.names['label']!r} is {label!r}, where {', '.join(_LABELS)} (true and 1: a good "
                f"answer) are expected"
            )
        return Judged(read(record, columns), _LABELS[text])

    return read_judged
