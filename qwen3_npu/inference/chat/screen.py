"""Show a chat's answer while it is generated: thoughts are dimmed, marked or hidden; control characters are escaped."""

from __future__ import annotations

from typing import TextIO

from qwen3_npu import console
from qwen3_npu.data.text.conversation import END_THINK, THINK

_DIM, _PLAIN = "\033[2m", "\033[0m"


class Screen:
    """Shows an answer. Text between <think> and </think> is dimmed (without a terminal: marked) or hidden."""

    def __init__(self, out: TextIO, *, hidden: bool, opened: bool = False) -> None:
        """Args: opened: the prompt ends with <think>, so the answer begins with a thought (Thinking-2507)."""
        self.out, self.hidden, self.colours = out, hidden, out.isatty()
        self.thinking, self.after_thought = False, False
        self.waiting = ""  # may be the beginning of a tag
        self._put("qwen3_npu: ")
        if opened:
            self.write(THINK)

    def write(self, piece: str) -> None:
        """Show more of the answer."""
        self.waiting += piece
        while True:
            tag = END_THINK if self.thinking else THINK
            before, found, after = self.waiting.partition(tag)
            if not found:
                break
            self._show(before)
            self.waiting = after
            self.thinking = not self.thinking
            if self.hidden:
                self.after_thought = not self.thinking
            else:
                self._put((_DIM if self.thinking else _PLAIN) if self.colours else tag)
        held = next((n for n in range(len(tag) - 1, 0, -1) if self.waiting.endswith(tag[:n])), 0)
        shown = len(self.waiting) - held
        self._show(self.waiting[:shown])
        self.waiting = self.waiting[shown:]

    def end(self) -> None:
        """End the answer."""
        self._show(self.waiting)
        self._put((_PLAIN if self.colours else "") + "\n")

    def _show(self, text: str) -> None:
        if self.after_thought:  # the empty line that ends a hidden thought
            text = text.lstrip("\n")
        if text and not (self.thinking and self.hidden):
            self.after_thought = False
            self._put(console.escaped(text) if self.colours else text)

    def _put(self, text: str) -> None:
        try:
            self.out.write(text)
            self.out.flush()
        except (OSError, ValueError) as error:
            console.give_up(error)
