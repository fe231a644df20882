"""Text around the model: prompts written by a template, answers decoded while they grow."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

from qwen3_npu.args.inference import PromptArgs
from qwen3_npu.data.text.conversation import SYSTEM, Conversation, Message
from qwen3_npu.data.text.encoder import Encoder, open_encoder
from qwen3_npu.data.text.prompt_types import AUTO, open_template, prompt_text
from qwen3_npu.data.text.templates import Template
from qwen3_npu.data.text.tokenizer import END_OF_TEXT, IM_END, TokenizerFolder, start_loading
from qwen3_npu.errors import UsageError
from qwen3_npu.inference.plan import InferencePlan
from qwen3_npu.inference.taught import PLAIN

_CUT_SHORT = "\ufffd"  # what a decoder writes for the first bytes of a character


class Writer:
    """Writes prompts with the template of --prompt-type, as text and as tokens.

    Attributes:
        encoder: text to tokens and back.
    """

    def __init__(self, tokenizer: TokenizerFolder, args: PromptArgs, *, backend: str = "tokenizers") -> None:
        self.tokenizer, self.args = tokenizer, args
        self.encoder: Encoder = open_encoder(start_loading(str(tokenizer.path), backend, 1))
        self.special = sorted(tokenizer.special, key=len, reverse=True)

    def text(self, messages: Sequence[Message]) -> str:
        """The text of a prompt, from messages whose first one may be the system's."""
        if messages and messages[0].role == SYSTEM:
            return self.prompt(Conversation(tuple(messages[1:]), messages[0].content))
        return self.prompt(Conversation(tuple(messages)))

    def prompt(self, conversation: Conversation, *, thinking: bool | None = None) -> str:
        """A conversation up to the start of the answer; without a template only a single message, as it is.

        Args:
            thinking: whether the model may think first; None: --enable-thinking decides.

        Raises:
            UsageError: there are several messages and no template, or the template refuses the conversation.
        """
        if conversation.system is None and self.args.system:
            conversation = conversation._replace(system=self.args.system)
        if self.args.template is None:
            if len(conversation.messages) != 1 or conversation.system or conversation.tools:
                raise UsageError(
                    "a conversation of several messages, or with tools or --system, needs a template: --prompt-type "
                    "auto, qwen3 or --hf-chat-template"
                )
            return conversation.messages[0].content
        try:
            return prompt_text(self.template, conversation, self.args.thinking if thinking is None else thinking)
        except ValueError as error:
            raise UsageError(f"--prompt-type {self.args.template}: {error}") from None

    @functools.cached_property
    def template(self) -> Template:
        """The template of --prompt-type. Raises: UsageError: the tokenizer has no such template."""
        return open_template(str(self.args.template), self.tokenizer)

    def tokens(self, text: str) -> list[int]:
        """Tokens of a text; special tokens written in it are special."""
        return self.encoder.encode([text]).ids.tolist()

    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer in a conversation, independent of config.json."""
        return tuple(self.tokenizer.special[t] for t in (IM_END, END_OF_TEXT) if t in self.tokenizer.special)

    def answer(self, tokens: Iterable[int], eos: Sequence[int]) -> str:
        """The generated text, without ending tokens."""
        return self.encoder.decode([token for token in tokens if token not in eos])


def for_conversations(plan: InferencePlan) -> InferencePlan:
    """The plan with a template: --prompt-type auto if none is given. A plan with `none` does not change."""
    if plan.prompts.template is not None or plan.prompts.template_given == PLAIN:
        return plan
    return dataclasses.replace(plan, prompts=dataclasses.replace(plan.prompts, prompt_type=AUTO))


def open_writer(plan: InferencePlan) -> tuple[Writer, InferencePlan]:
    """The writer of the plan's prompts, and the plan with the template's ending tokens added."""
    writer = Writer(plan.tokenizer, plan.prompts)
    if writer.args.template is not None:
        plan = dataclasses.replace(plan, eos=tuple(sorted({*plan.eos, *writer.ends()})))
    return writer, plan


class TextStream:
    """Decodes tokens one by one; delays incomplete characters, and text that may become a stop text."""

    def __init__(self, encoder: Encoder, eos: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.encoder, self.eos, self.stops = encoder, eos, stops
        self.tokens: list[int] = []
        self.text, self.shown = "", 0
        self.first, self.read = 0, 0  # tokens whose text is decoded again with each new one, and those done with
        self.stopped = False

    def add(self, token: int) -> str:
        """Add a token. Returns the text that can be shown now."""
        if token in self.eos:
            return self.rest()
        self.tokens.append(token)
        # Some tokens change the text of the one before: decoding starts there.
        before = self.encoder.decode(self.tokens[self.first : self.read])
        now = self.encoder.decode(self.tokens[self.first :])
        if len(now) <= len(before) or now.endswith(_CUT_SHORT):
            return ""
        self.text += now[len(before) :]
        self.first, self.read = self.read, len(self.tokens)
        places = [place for stop in self.stops if (place := self.text.find(stop)) >= 0]
        if places:
            self.stopped = True
            self.text = self.text[: min(places)]
        return self._show(len(self.text) if self.stopped else len(self.text) - self._held_back())

    def rest(self) -> str:
        """The rest of the text, after the last token."""
        if not self.stopped:
            before = self.encoder.decode(self.tokens[self.first : self.read])
            self.text += self.encoder.decode(self.tokens[self.first :])[len(before) :]
            self.first = self.read = len(self.tokens)
        return self._show(len(self.text))

    def _held_back(self) -> int:
        """Number of characters at the end with which a stop text may begin."""
        longest = max(map(len, self.stops), default=1) - 1
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self.text[-n:]) for s in self.stops)), 0)

    def _show(self, end: int) -> str:
        shown, self.shown = self.shown, max(self.shown, end)
        return self.text[shown : self.shown]
