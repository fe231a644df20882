"""Encode texts with common paragraphs: few-shot prompts differ in their last paragraphs only."""

from __future__ import annotations

from collections.abc import Sequence

from qwen3_npu import log
from qwen3_npu.inference.text import Writer


class ParagraphEncoder:
    """Encodes texts with common paragraphs; each paragraph is encoded once.

    After an empty line a letter or digit always begins a new token of Qwen's (the pattern in its tokenizer.json), so
    the tokens of a text are those of its paragraphs. The first texts are checked, for tokenizers that differ.
    """

    def __init__(self, writer: Writer) -> None:
        self.encoder = writer.encoder
        self.checks = 8  # calls whose tokens are still compared with those of unsplit texts
        self.known: dict[str, list[int]] = {}
        self.safe = True

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text."""
        if not self.safe:
            return [self.encoder.encode([text]).ids.tolist() for text in texts]
        found = [[token for piece in paragraphs(text) for token in self._piece(piece)] for text in texts]
        if self.checks:
            self.checks -= 1
            whole = [self.encoder.encode([text]).ids.tolist() for text in texts]
            if whole != found:
                log.warning_once(
                    "this tokenizer joins paragraphs: texts are encoded without splitting, which takes longer"
                )
                self.safe = False
                return whole
        return found

    def _piece(self, piece: str) -> list[int]:
        if piece not in self.known:
            self.known[piece] = self.encoder.encode([piece]).ids.tolist()
        return self.known[piece]


def paragraphs(text: str) -> list[str]:
    """The text, split after every empty line before an ASCII letter or digit."""
    pieces, start, at = [], 0, text.find("\n\n")
    while at >= 0:
        if text[at + 2 : at + 3].isascii() and text[at + 2 : at + 3].isalnum():
            pieces.append(text[start : at + 2])
            start = at + 2
        at = text.find("\n\n", at + 1)
    return [*pieces, text[start:]]
