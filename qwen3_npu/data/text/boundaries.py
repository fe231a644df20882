"""Positions at which a text may be split so that its parts have the tokens of the full text."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from qwen3_npu.data.text.tokenizer import TokenizerFolder

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Boundaries:
    """Positions between tokens at which a text may be split."""

    def __init__(self, tokenizer: TokenizerFolder) -> None:
        self.file, self.special = tokenizer.json_path, tuple(tokenizer.special)

    @functools.cached_property
    def reference(self) -> Tokenizer:
        """Hugging Face's `tokenizers`, which gives the positions of tokens in the text; loaded when first needed."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(self.file)

    def at(self, text: str, position: int) -> int:
        """The position, moved to the start of the token that it would split (so does transformers).

        Raises:
            ValueError: the parts would not have the tokens of the full text.
        """
        if self._safe(text, position):
            return position
        start, stop = self._around(text, position)
        whole = self.reference.encode(text[start:stop], add_special_tokens=False)
        moved = next(s for s, e in whole.offsets if e > position - start)
        left, right = (
            self.reference.encode(part, add_special_tokens=False).ids
            for part in (text[start : start + moved], text[start + moved : stop])
        )
        if left + right != whole.ids:
            raise ValueError(f"no token starts where the answer does ({text[position : position + 20]!r})")
        return start + moved

    def checked(self, text: str, position: int) -> int:
        """The position itself. Raises: ValueError: as `at`, or it splits a token."""
        if self.at(text, position) != position:
            raise ValueError(f"an answer ends inside a token ({text[max(position - 10, 0) : position + 10]!r})")
        return position

    def _safe(self, text: str, position: int) -> bool:
        """Whether the position is beside a special token, or after a line end that no spaces follow."""
        if (
            not 0 < position < len(text)
            or text.endswith(self.special, 0, position)
            or text.startswith(self.special, position)
        ):
            return True
        return text[position - 1] == "\n" and not text[position].isspace()

    def _around(self, text: str, position: int) -> tuple[int, int]:
        """From the special token before to the one behind."""
        before = [place + len(token) for token in self.special if (place := text.rfind(token, 0, position)) >= 0]
        after = [place for token in self.special if (place := text.find(token, position)) >= 0]
        return max(before, default=0), min(after, default=len(text))
