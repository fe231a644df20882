"""Find function calls in answers. Qwen3 writes each as `<tool_call>{"name": .., "arguments": ..}</tool_call>`.

The form: the chat template of Qwen3 (tokenizer_config.json of Qwen/Qwen3-8B). OpenAI's objects:
https://platform.openai.com/docs/api-reference/chat/object.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import NamedTuple

from qwen3_npu.data.text.conversation import END_THINK, THINK, ToolCall, calls_of

BEGIN_CALL, END_CALL = "<tool_call>", "</tool_call>"


class CallRules(NamedTuple):
    """Rules for the calls of an answer.

    Attributes:
        only_one: calls after the first one are dropped (`parallel_tool_calls: false`).
        in_thought: the prompt ends inside a thought, so the answer begins with one.
    """

    only_one: bool = False
    in_thought: bool = False


class CallReader:
    """Separates calls from text while an answer grows. Thoughts contain no calls."""

    def __init__(self, rules: CallRules) -> None:
        self.rules = rules
        self.rest = ""  # text that may be part of a call or of a mark
        self.thinks: bool | None = True if rules.in_thought else None  # None: nothing was said yet
        self.calls = 0

    def read(self, text: str, *, end: bool) -> list[str | ToolCall]:
        """Add text. Returns the texts and calls that are certain now, in order.

        A call that is no JSON with a name is text. White space beside a call is dropped.

        Args:
            end: this is the last text.
        """
        self.rest += text
        found: list[str | ToolCall] = []
        for part in self._parts(end):
            if isinstance(part, str) and found and isinstance(found[-1], str):
                found[-1] += part
            elif part:
                found.append(part)
        return found

    def _parts(self, end: bool) -> Iterator[str | ToolCall]:
        if self.thinks is None:
            begin = self.rest.lstrip()
            if len(begin) < len(THINK) and THINK.startswith(begin) and not end:
                return
            self.thinks = begin.startswith(THINK)
        if self.thinks:
            thought, mark, self.rest = self.rest.partition(END_THINK)
            if not mark:
                self.rest = "" if end else thought[len(thought) - _begun(thought, END_THINK) :]
                yield thought[: len(thought) - len(self.rest)]
                return
            self.thinks = False
            yield thought + mark
        while BEGIN_CALL in self.rest:
            before, _, after = self.rest.partition(BEGIN_CALL)
            written, mark, behind = after.partition(END_CALL)
            if not mark and not end:
                break
            call = _call(written)
            if call is None:
                yield before + BEGIN_CALL + written + mark
                self.rest = behind
                continue
            yield before.rstrip()
            if not (self.calls and self.rules.only_one):
                yield call
            self.calls += 1
            self.rest = behind
        yield self._text(end)

    def _text(self, end: bool) -> str:
        """The part of the remaining characters that is certainly text."""
        if self.calls:
            self.rest = self.rest.lstrip()
        place = self.rest.find(BEGIN_CALL)
        kept = len(self.rest) - _begun(self.rest, BEGIN_CALL) if place < 0 else place
        kept = len(self.rest[:kept].rstrip())  # white space may stand beside a call
        if end:
            kept = len(self.rest)
        text, self.rest = self.rest[:kept], self.rest[kept:]
        return text


def _begun(text: str, mark: str) -> int:
    """Number of characters at the end of a text with which a mark may begin."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)


def _call(written: str) -> ToolCall | None:
    try:
        (call,) = calls_of(json.loads(written))
    except (ValueError, RecursionError):
        return None
    return call


def tool_call(call: ToolCall) -> dict[str, object]:
    """OpenAI's object of a call; arguments are the text of a JSON object."""
    function = {"name": call.name, "arguments": call.arguments_text()}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
