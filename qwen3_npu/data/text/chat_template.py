"""The tokenizer's own chat template (`--prompt-type hf`), and where in its text the answers are.

The text is exactly that of transformers' apply_chat_template. A template does not say which of its text is an answer,
and may write an earlier message differently once a later one follows. So each answer is found by rendering once more
with a mark at its end: it starts behind the generation prompt before the mark and includes the end-of-turn token.
"""

from __future__ import annotations

import datetime
import json
from typing import Any

from qwen3_npu.data.text.conversation import ASSISTANT, NO_THOUGHT, Conversation, Message, without_thought
from qwen3_npu.data.text.templates import Template, Turn
from qwen3_npu.data.text.tokenizer import TokenizerFolder
from qwen3_npu.errors import UsageError

_MARK = "\ue000\ue001"  # characters of a private area


def load_template(tokenizer: TokenizerFolder) -> str:
    """The chat template's source.

    Raises:
        UsageError: the tokenizer has none.
    """
    file = tokenizer.path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = tokenizer.config.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    if not isinstance(found, str):
        raise UsageError(f"--prompt-type hf: {tokenizer.path} has no chat template; use --prompt-type qwen3")
    return found


def hf_template(tokenizer: TokenizerFolder) -> Template:
    """The tokenizer's chat template as a way to write conversations.

    Raises:
        UsageError: there is none, it is broken, or the tokenizer names no eos_token to end turns with.
    """
    renderer = _Renderer(load_template(tokenizer), tokenizer)
    end = tokenizer.named("eos_token")
    if end is None:
        raise UsageError(f"--prompt-type hf: {tokenizer.path} names no eos_token")
    opening = renderer.opening()

    def render(conversation: Conversation, thinking: bool | None, last_only: bool) -> list[Turn]:
        if thinking is False:
            plain = tuple(without_thought(m) if m.role == ASSISTANT else m for m in conversation.messages)
            conversation = conversation._replace(messages=plain)
        text = renderer(conversation, thinking)
        turns, position = [], 0
        for start, stop in _answers(renderer, conversation, thinking, text, (opening, end)):
            if not thinking and text.startswith(NO_THOUGHT, start):
                start += len(NO_THOUGHT)  # written by the template, not said by anyone
            turns.append(Turn([text[position:start]], [text[start:stop]]))
            position = stop
        if text[position:]:
            turns.append(Turn([text[position:]], []))
        return turns

    return Template(render, (end,))


def asked(tokenizer: TokenizerFolder, conversation: Conversation, thinking: bool | None) -> str:
    """A conversation up to where the answer starts.

    Raises:
        UsageError: the tokenizer has no template, or a broken one.
        ValueError: the template refuses the conversation.
    """
    return _Renderer(load_template(tokenizer), tokenizer)(conversation, thinking, ask=True)


class _Renderer:
    """transformers' way of rendering: the same environment, filters and variables."""

    def __init__(self, source: str, tokenizer: TokenizerFolder) -> None:
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.broken = jinja2.TemplateError
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = self._raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self.template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UsageError(f"--prompt-type hf: the chat template of {tokenizer.path} is broken: {error}") from None
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        self.variables: dict[str, Any] = {name: tokenizer.named(name) for name in names if tokenizer.named(name)}

    def opening(self) -> str:
        """What the template writes before an answer."""
        question = Conversation((Message("user", "x"),))
        told, asked = self(question, None), self(question, None, ask=True)
        if not asked.startswith(told) or asked == told:
            raise UsageError("--prompt-type hf: the chat template has no generation prompt; use --prompt-type qwen3")
        return asked[len(told) :]

    def _raise(self, message: str) -> None:
        raise self.broken(message)

    def __call__(self, conversation: Conversation, thinking: bool | None, *, ask: bool = False) -> str:
        """The text of a conversation; with `ask`, up to where an answer starts."""
        variables = dict(self.variables)
        if thinking is not None:
            variables["enable_thinking"] = thinking
        messages = [_as_dict(message) for message in conversation.messages]
        if conversation.system:
            messages.insert(0, {"role": "system", "content": conversation.system})
        try:
            return self.template.render(
                messages=messages, tools=list(conversation.tools) or None, add_generation_prompt=ask, **variables
            )
        except self.broken as error:
            raise ValueError(f"the chat template refuses it: {error}") from None


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _as_dict(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        found["reasoning_content"] = message.reasoning
    if message.calls:
        calls = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in message.calls]
        found["tool_calls"] = calls
    return found


def _answers(
    render: _Renderer, conversation: Conversation, thinking: bool | None, text: str, around: tuple[str, str]
) -> list[tuple[int, int]]:
    """From where to where each learned answer goes in `text`.

    Args:
        around: what stands before an answer, and the token that ends it.

    Raises:
        ValueError: they cannot be told.
    """
    opening, end = around
    messages, found, previous = conversation.messages, [], 0
    for i, message in enumerate(messages):
        if message.role != ASSISTANT:
            continue
        marked = message._replace(content=message.content + _MARK)
        other = render(conversation._replace(messages=(*messages[:i], marked, *messages[i + 1 :])), thinking)
        mark = other.rfind(_MARK)
        start, stop = text.find(opening, previous, mark), text.find(end, mark)
        if mark < 0 or other[:mark] != text[:mark] or start < 0 or start != text.rfind(opening, previous, mark):
            raise ValueError(f"the chat template does not show where message {i + 1} starts")
        if stop < 0:
            raise ValueError(f"the chat template ends message {i + 1} without {end}")
        previous = stop + len(end)
        if message.learned:
            found.append((start + len(opening), previous))
    return found
