"""The tokenizer's own chat template (`--prompt-type hf`): the text of transformers' apply_chat_template, exactly.

Which messages, tools and variables a template sees, and which of several templates is taken, is as in transformers 5
(utils/chat_template_utils.py, PreTrainedTokenizerBase.apply_chat_template and get_chat_template).
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qwen3_npu.data.text.answers import Rendered, ends_turn, find_answers
from qwen3_npu.data.text.boundaries import Boundaries
from qwen3_npu.data.text.conversation import NO_THOUGHT, THINK, Conversation, Message
from qwen3_npu.data.text.templates import Template, Turn
from qwen3_npu.data.text.tokenizer import TokenizerFolder
from qwen3_npu.errors import UsageError

# Variables of a template that name tokens.
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Marks around an answer while `{% generation %}` is looked for; characters of Unicode's private area.
_OPENED, _CLOSED = "\ue010", "\ue011"


def chat_templates(tokenizer: TokenizerFolder) -> dict[str, str]:
    """The chat templates of a tokenizer folder by name, usually `default` only; empty if there is none.

    Raises:
        UsageError: a file cannot be read, or tokenizer_config.json holds something else there.
    """
    found, file = {}, tokenizer.path / "chat_template.jinja"
    named = sorted((tokenizer.path / "additional_chat_templates").glob("*.jinja"))
    try:
        for path in [file] if file.is_file() else []:
            found["default"] = path.read_text(encoding="utf-8")
        for path in named:
            found[path.stem] = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompt-type hf: a chat template of {tokenizer.path} cannot be read: {error}") from None
    if found:
        return found
    given = tokenizer.config.get("chat_template")
    if isinstance(given, list) and all(isinstance(e, dict) for e in given):
        given = {entry.get("name"): entry.get("template") for entry in given}
    if isinstance(given, str):
        given = {"default": given}
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(t, str) for both in given.items() for t in both):
        raise UsageError(
            f"{tokenizer.path / 'tokenizer_config.json'}: chat_template is no template and no list of them"
        )
    return given


def hf_template(tokenizer: TokenizerFolder) -> Template:
    """The tokenizer's chat template as a `Template`.

    Raises:
        UsageError: there is none, or it is broken.
    """
    sources = chat_templates(tokenizer)
    if not sources:
        raise UsageError(f"--prompt-type hf: {tokenizer.path} has no chat template; use --prompt-type qwen3")
    chosen = _Chosen(tokenizer, sources)
    boundaries = Boundaries(tokenizer)
    # Not to be learned: the marks of an answer without thoughts that the template itself writes.
    end = chosen.of(None).end or tokenizer.named("eos_token") or ""

    def render(conversation: Conversation, thinking: bool | None, last_only: bool) -> list[Turn]:
        one = chosen.of(conversation.tools)
        rendered = Rendered(one.renderer, conversation, thinking)
        text, turns, position = rendered.text, [], 0
        for start, stop in find_answers(rendered, one.opening(thinking), one.end or end):
            if not thinking and text.startswith(NO_THOUGHT, start):
                start += len(NO_THOUGHT)  # written by the template, not said by anyone
            start = boundaries.at(text, start)
            turns.append(Turn([text[position:start]], [text[start:stop]]))
            position = boundaries.checked(text, stop)
        if text[position:]:
            turns.append(Turn([text[position:]], []))
        return turns

    def prompt(conversation: Conversation, thinking: bool | None) -> list[str]:
        return [chosen.of(conversation.tools).renderer(conversation, thinking, ask=True)]

    opening = chosen.of(None).opening(None)
    opens_thought = opening.rstrip().endswith(THINK)
    identity = hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()
    return Template(
        render,
        prompt,
        (end,) if end in tokenizer.special else (),
        end,
        identity=f"hf:{identity}",
        opens_thought=opens_thought,
    )


class Named(NamedTuple):
    """One of a tokenizer's templates.

    Attributes:
        end: the token after an answer; "" if none can be determined.
    """

    renderer: Renderer
    end: str

    def opening(self, thinking: bool | None) -> str:
        """The text that the template writes before an answer; "" if there is none or it cannot be determined."""
        return self.renderer.opening(thinking)


class _Chosen:
    """The templates of a tokenizer, compiled when they are first needed."""

    def __init__(self, tokenizer: TokenizerFolder, sources: Mapping[str, str]) -> None:
        self.tokenizer, self.sources = tokenizer, sources
        self.compiled: dict[str, Named] = {}

    def of(self, tools: Sequence[object] | None) -> Named:
        """The template for a conversation with these tools, chosen as in transformers' get_chat_template.

        Raises:
            UsageError: there are several, and none is the default.
        """
        name = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        if len(self.sources) == 1 and name not in self.sources:
            name = "default"
        if name not in self.sources:
            listed = ", ".join(sorted(self.sources))
            raise UsageError(f"--prompt-type hf: {self.tokenizer.path} has chat templates {listed}, but no default one")
        if name not in self.compiled:
            renderer = Renderer(self.sources[name], self.tokenizer)
            self.compiled[name] = Named(renderer, ends_turn(renderer, self.tokenizer.special))
        return self.compiled[name]


class Renderer:
    """transformers' way of rendering: the same environment, filters and variables.

    Attributes:
        marks_answers: whether the template has {% generation %}.
    """

    def __init__(self, source: str, tokenizer: TokenizerFolder) -> None:
        """Raises: UsageError: the template is not valid Jinja."""
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.marking = self.marks_answers = False
        owner = self

        class Generation(Extension):
            """`{% generation %}` .. `{% endgeneration %}`: an answer."""

            tags = {"generation"}  # noqa: RUF012  (as Jinja declares it)

            def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
                owner.marks_answers = True
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return jinja2.nodes.CallBlock(self.call_method("_around"), [], [], body).set_lineno(line)

            def _around(self, caller: Any) -> str:
                return f"{_OPENED}{caller()}{_CLOSED}" if owner.marking else caller()

        self.error = jinja2.TemplateError
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = self._raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self.template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UsageError(f"--prompt-type hf: the chat template of {tokenizer.path} is broken: {error}") from None
        self.variables: dict[str, object] = {name: tokenizer.named(name) for name in _TOKENS if tokenizer.named(name)}

    def _raise(self, message: str) -> None:
        raise self.error(message)

    def __call__(self, conversation: Conversation, thinking: bool | None, *, ask: bool = False) -> str:
        """The text of a conversation; with `ask`, up to where an answer starts. Raises: ValueError: it is refused."""
        return self.text(messages_of(conversation), conversation.tools, thinking, ask=ask)

    def text(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None,
        thinking: bool | None,
        *,
        ask: bool = False,
    ) -> str:
        """The same for messages in the form that the template sees."""
        variables = dict(self.variables)
        if thinking is not None:
            variables["enable_thinking"] = thinking
        listed = None if tools is None else list(tools)
        try:
            return self._render(messages=messages, tools=listed, add_generation_prompt=ask, **variables)
        except ValueError:
            # A message that only calls functions may have no content; not every template knows that.
            if all("content" in message for message in messages):
                raise
        filled = [{"content": "", **message} for message in messages]
        return self._render(messages=filled, tools=listed, add_generation_prompt=ask, **variables)

    def _render(self, **variables: object) -> str:
        try:
            return self.template.render(documents=None, **variables)
        except Exception as error:  # a template is a program, which may raise anything
            what = str(error).splitlines() or [type(error).__name__]
            raise ValueError(f"the chat template refuses it: {what[0]}") from None

    def generations(self, conversation: Conversation, thinking: bool | None) -> tuple[str, list[tuple[int, int]]]:
        """The text, and where each {% generation %} is in it. Raises: ValueError: it cannot be determined."""
        self.marking = True
        try:
            marked = self(conversation, thinking)
        finally:
            self.marking = False
        text, found = "", []
        for i, part in enumerate(marked.split(_OPENED)):
            inside, closed, after = part.partition(_CLOSED) if i else ("", "", part)
            if i:
                found.append((len(text), len(text) + len(inside)))
            text += inside + after
            if bool(i) != bool(closed) or _CLOSED in after:
                raise ValueError("the chat template's {% generation %} cannot be followed")
        return text, found

    @functools.lru_cache(maxsize=4)  # noqa: B019  (as long as the command)
    def opening(self, thinking: bool | None) -> str:
        """The text that the template writes before an answer; "" if it refuses a plain question or writes nothing."""
        question = Conversation((Message("user", "x"),))
        try:
            told, asked = self(question, thinking), self(question, thinking, ask=True)
        except ValueError:
            return ""
        return asked[len(told) :] if asked.startswith(told) else ""


def messages_of(conversation: Conversation) -> list[dict[str, object]]:
    """The messages as a chat template sees them: those of the record if it has them, without null keys."""
    messages = [_as_dict(message) for message in conversation.messages]
    if conversation.system is not None:
        messages.insert(0, {"role": "system", "content": conversation.system})
    return messages


def _as_dict(message: Message) -> dict[str, object]:
    if message.given is not None:
        return dict(message.given)
    found: dict[str, object] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        found |= {"thinking": message.reasoning, "reasoning_content": message.reasoning}
    if message.calls:
        calls = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in message.calls]
        found["tool_calls"] = calls
    return found


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
