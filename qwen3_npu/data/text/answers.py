"""Find the answers in a text that a chat template wrote.

A template with `{% generation %}` marks them. With any other template, the conversation is rendered again with a mark
after each answer. The text before an answer is the generation prompt, or its first lines (a template may open a thought
before the last answer only).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Protocol

from qwen3_npu.data.text.conversation import ASSISTANT, Conversation, Message


class Rendering(Protocol):
    """A function that applies a chat template (see `chat_template.Renderer`)."""

    marks_answers: bool

    def __call__(self, conversation: Conversation, thinking: bool | None, *, ask: bool = False) -> str:
        """The text of a conversation."""

    def generations(self, conversation: Conversation, thinking: bool | None) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the spans that the template marks as answers."""


class Rendered:
    """A conversation and its text."""

    def __init__(self, render: Rendering, conversation: Conversation, thinking: bool | None) -> None:
        """Raises: ValueError: the template refuses it."""
        self.render, self.conversation, self.thinking = render, conversation, thinking
        self.text = render(conversation, thinking)
        self.answers = [i for i, message in enumerate(conversation.messages) if message.role == ASSISTANT]

    @functools.cached_property
    def mark(self) -> str:
        """Characters of a private-use area that do not occur in the text."""
        return next(pair for c in range(0xE000, 0xF8FF) if (pair := chr(c) * 2) not in self.text)

    def marked(self, numbers: Sequence[int]) -> str:
        """The text with a mark after the content of these answers."""
        messages = list(self.conversation.messages)
        for i in numbers:
            messages[i] = _marked(messages[i], self.mark)
        return self.render(self.conversation._replace(messages=tuple(messages)), self.thinking)


def ends_turn(render: Rendering, special: Mapping[str, int]) -> str:
    """The token that a template writes after an answer; "" if it cannot be determined."""
    question, answer = Message("user", "x"), Message(ASSISTANT, "\ue000\ue000")
    try:
        text = render(Conversation((question, answer)), None)
    except ValueError:
        return ""
    after = text.rpartition(answer.content)[2]
    places = {token: place for token in special if (place := after.find(token)) >= 0}
    return min(places, key=lambda token: (places[token], -len(token)), default="")


def find_answers(rendered: Rendered, opening: str, end: str) -> list[tuple[int, int]]:
    """The span of each learned answer in the text, with the token that ends it.

    Args:
        opening: text that the template writes before an answer.
        end: the token that ends an answer.

    Raises:
        ValueError: it cannot be determined.
    """
    messages = rendered.conversation.messages
    for i in rendered.answers:
        if not all(call.name in rendered.text for call in messages[i].calls):
            raise ValueError(f"the chat template does not write the function calls of message {i + 1}")
    if rendered.render.marks_answers:
        return _said_by_template(rendered)
    if not end:
        raise ValueError("the chat template ends an answer with no token of the tokenizer")
    found, previous = [], 0
    for i, mark in zip(rendered.answers, _ends(rendered), strict=True):
        start = _start(rendered, i, (previous, mark), _openings(opening))
        stop = rendered.text.find(end, mark)
        if stop < 0:
            raise ValueError(f"the chat template ends message {i + 1} without {end}")
        previous = stop + len(end)
        if messages[i].learned:
            found.append((start, previous))
    return found


def _said_by_template(rendered: Rendered) -> list[tuple[int, int]]:
    text, spans = rendered.render.generations(rendered.conversation, rendered.thinking)
    learned = [rendered.conversation.messages[i].learned for i in rendered.answers]
    if text != rendered.text or not spans:
        raise ValueError("the chat template's {% generation %} marks no answer of it")
    if all(learned):
        return spans
    if len(spans) != len(learned):
        raise ValueError("the chat template's {% generation %} does not tell which answer is not to be learned")
    return [span for span, chosen in zip(spans, learned, strict=True) if chosen]


def _ends(rendered: Rendered) -> list[int]:
    """The end of each answer's content in the text."""
    parts = rendered.marked(rendered.answers).split(rendered.mark)
    if len(parts) == len(rendered.answers) + 1 and "".join(parts) == rendered.text:
        ends, position = [], 0
        for part in parts[:-1]:
            position += len(part)
            ends.append(position)
        return ends
    # The template does not only insert the marks: it changes other text, too.
    ends = []
    for i in rendered.answers:
        before, mark, _ = rendered.marked([i]).rpartition(rendered.mark)
        if not mark or rendered.text[: len(before)] != before:
            raise ValueError(f"the chat template does not show where message {i + 1} is")
        ends.append(len(before))
    if ends != sorted(ends):
        raise ValueError("the chat template changes the order of the messages")
    return ends


def _openings(opening: str) -> list[str]:
    """The opening, then its lines without the last, and so on."""
    lines = opening.splitlines(keepends=True)
    return ["".join(lines[:n]) for n in range(len(lines), 0, -1)]


def _start(rendered: Rendered, number: int, between: tuple[int, int], openings: Sequence[str]) -> int:
    """The position where an answer starts."""
    text = rendered.text
    for opening in openings:
        place = text.find(opening, *between)
        if place >= 0 and place == text.rfind(opening, *between):
            return place + len(opening)
        if place >= 0:
            break  # more than once: it is part of a message
    conversation = rendered.conversation
    before = conversation._replace(messages=conversation.messages[:number])
    asked = rendered.render(before, rendered.thinking, ask=True)
    if not between[0] <= len(asked) <= between[1] or not text.startswith(asked):
        raise ValueError(f"the chat template does not show where message {number + 1} starts")
    return len(asked)


def _marked(message: Message, mark: str) -> Message:
    """A message with a mark after its text, or, without text, after the name of the first function that it calls."""
    content = message.content.rstrip()
    if content or not message.calls:
        content += mark + message.content[len(content) :]
        shown = None if message.given is None else {**message.given, "content": content}
        return message._replace(content=content, given=shown)
    first, *others = message.calls
    calls = (first._replace(name=first.name + mark), *others)
    given = message.given
    said = None if given is None else given.get("tool_calls")
    if given is not None and isinstance(said, list) and said:
        given = {**given, "tool_calls": [_marked_call(said[0], mark), *said[1:]]}
    return message._replace(calls=calls, given=given)


def _marked_call(call: dict[str, object], mark: str) -> dict[str, object]:
    if isinstance(function := call.get("function"), dict):
        return {**call, "function": _marked_call(function, mark)}
    return {**call, "name": f"{call['name']}{mark}"}
