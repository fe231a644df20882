"""A conversation, whatever format it came from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"
THINK, END_THINK = "<think>", "</think>"
NO_THOUGHT = "<think>\n\n</think>\n\n"
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)


class ToolCall(NamedTuple):
    """A function call of the assistant; arguments are an object, or the text to write as it is."""

    name: str
    arguments: object

    def arguments_text(self) -> str:
        """As Qwen3's chat template writes them."""
        return self.arguments if isinstance(self.arguments, str) else to_json(self.arguments)


class Message(NamedTuple):
    """One message.

    Attributes:
        role: system, user, assistant or tool (the answer of a function).
        reasoning: the assistant's thoughts, where the format keeps them apart from the content.
        calls: function calls of the assistant, written after the content.
        learned: whether the assistant's message is supervised.
        given: the message for a chat template, if the record holds more than the fields above (names, ids of calls);
            None if the message is made of these fields.
    """

    role: str
    content: str
    reasoning: str | None = None
    calls: tuple[ToolCall, ...] = ()
    learned: bool = True
    given: Mapping[str, object] | None = None

    def has_thought(self) -> bool:
        """Whether thoughts are given, apart or inside the content; empty ones count."""
        return self.reasoning is not None or THINK in self.content or END_THINK in self.content


class Conversation(NamedTuple):
    """Messages after the system message, and the assistant's tools.

    Attributes:
        system: the system message; None if there is none. An empty one counts, since chat templates may write it.
        tools: each as {"type": "function", "function": {...}}; None if no list is given.
    """

    messages: tuple[Message, ...]
    system: str | None = None
    tools: tuple[dict[str, object], ...] | None = None


class PreferencePair(NamedTuple):
    """A prompt, with a chosen and a rejected answer."""

    prompt: Conversation
    chosen: Message
    rejected: Message


class Judged(NamedTuple):
    """A conversation whose last answer is labelled good or bad."""

    conversation: Conversation
    desirable: bool


def to_json(value: object) -> str:
    """JSON as chat templates write it."""
    return json.dumps(value, ensure_ascii=False)


def without_thought(message: Message) -> Message:
    """The message without its thoughts.

    A template may open `<think>` itself (Qwen3-Thinking-2507): then the answer holds `</think>` only, and the text
    before it is the thought.
    """
    content = message.content
    if END_THINK in content and THINK not in content[: content.index(END_THINK)]:
        content = content.partition(END_THINK)[2]
    return message._replace(content=_THOUGHT.sub("", content).lstrip("\n"), reasoning=None, given=None)


def checked_conversation(conversation: Conversation) -> Conversation:
    """The conversation itself. Raises: ValueError: nothing can be learned from it."""
    messages = conversation.messages
    if not messages:
        raise ValueError("no messages")
    if messages[-1].role != ASSISTANT:
        raise ValueError(f"the last message is the {messages[-1].role}'s; there is no answer to learn")
    if messages[0].role in (ASSISTANT, TOOL):
        raise ValueError(f"the first message is the {messages[0].role}'s; there is no question")
    return conversation


def as_object(value: object, what: str) -> dict[str, object]:
    """The value itself. Raises: ValueError: it is no object with text keys; `what` names it."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{what}: an object is expected, not {repr(value)[:80]}")
    return value


def tools_of(value: object) -> tuple[dict[str, object], ...] | None:
    """A `tools` column (JSON text or a list) -> tools, None for nothing. Raises: ValueError: it is neither."""
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"tools are not JSON: {error}") from None
    if value is None:
        return None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError("tools are not a list of objects")
    tools = tuple(tool if tool.get("type") == "function" else {"type": "function", "function": tool} for tool in value)
    if not all(isinstance(tool.get("function"), dict) for tool in tools):
        raise ValueError('a tool is {"type": "function", "function": {..}} or what stands inside')
    return tools


def calls_of(value: object) -> tuple[ToolCall, ...]:
    """Function calls in OpenAI's form or as {"name", "arguments"}, one or a list. Raises: ValueError: not so."""
    calls = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    found = []
    for call in calls:
        function = call.get("function") or call if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
            raise ValueError('a function call is {"name": .., "arguments": ..}, not ' + repr(call)[:80])
        found.append(ToolCall(function["name"], function["arguments"]))
    return tuple(found)


def written_calls(text: str) -> tuple[str | None, tuple[ToolCall, ...]]:
    """A function_call message of ShareGPT: JSON, thoughts before it allowed -> (thoughts, calls).

    Raises:
        ValueError: no JSON.
    """
    reasoning = None
    if thought := _THOUGHT.search(text):
        reasoning = thought.group()[len(THINK) : -len(END_THINK)].strip("\n")
        text = text.replace(thought.group(), "", 1)
    try:
        return reasoning, calls_of(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"a function call is not JSON: {error}") from None
