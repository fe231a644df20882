"""What is probably wrong with a conversation."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwen3_npu.data.text.conversation import ASSISTANT, END_THINK, NO_THOUGHT, THINK, Conversation, Message, Pair

_CONTROL = re.compile(r"<\|(?:im_start|im_end|endoftext)\|>")
_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>")
# An answer of some length that stops at a letter, a comma or an opening bracket.
_LONG = 300
_OPEN_END = re.compile(r"[A-Za-z,(\[{]$")


def lint(conversation: Conversation | Pair, thinking: bool | None) -> Iterator[str]:
    """Warnings about one conversation.

    Args:
        thinking: --enable-thinking.
    """
    if isinstance(conversation, Pair):
        if conversation.chosen == conversation.rejected:
            yield "chosen and rejected are the same"
        conversation = conversation.prompt._replace(
            messages=(*conversation.prompt.messages, conversation.chosen, conversation.rejected)
        )
    for message in conversation.messages:
        if _CONTROL.search(message.content):
            yield "the text holds control tokens such as <|im_end|>, which would end the turn"
        if message.role == ASSISTANT:
            yield from _answer(message, thinking)
        elif not message.content.strip():
            yield f"the {message.role}'s message is empty"


def _answer(message: Message, thinking: bool | None) -> Iterator[str]:
    opened, closed = message.content.count(THINK), message.content.count(END_THINK)
    if opened > 1 or (opened and message.reasoning is not None):
        yield "an answer has thoughts twice"
    elif opened != closed:
        yield f"an answer has {THINK} without {END_THINK}, or the other way round"
    if _EMPTY_THOUGHT.search(message.content) or (message.reasoning is not None and not message.reasoning.strip()):
        yield f"an answer has empty thoughts, which are learned ({NO_THOUGHT.split()[0]} with nothing in it)"
    elif thinking and not message.has_thought():
        yield "an answer has no thoughts; with --enable-thinking true it learns empty ones"
    if thinking is False and message.has_thought():
        yield "an answer's thoughts are removed by --enable-thinking false"
    text = message.content.rpartition(END_THINK)[2].strip()
    if not text and not message.calls:
        yield "an answer is empty"
    elif len(text) >= _LONG and not message.calls and _OPEN_END.search(text):
        yield "an answer seems to be cut off (it is long and ends in the middle of a sentence)"
