"""Text to tokens: by `fastokens` if it is installed and agrees with `tokenizers`, else by `tokenizers`.

`tokenizers` is the reference. The faster library is compared with it at the start, on texts that libraries often get
wrong, and later on one text of every few batches. Texts that are not in Unicode's form NFC always go to `tokenizers`
(normalisation tables differ between libraries).
"""

from __future__ import annotations

import dataclasses
import itertools
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from qwen3_npu import log
from qwen3_npu.data.text.tokenizer import FAST, REFERENCE, FlatTokenizer, Loading
from qwen3_npu.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LONGEST_SPOT_CHECK = 2000
_BATCHES_PER_SPOT_CHECK = 8

# Spaces, line ends, digits, contractions, scripts, combining marks, emoji, special tokens inside text.
PROBES = (
    "",
    " ",
    "\n",
    " \n \n\n  x\t\ty \r\n z",
    "Hello, world! It's 3:45 pm; don't WE'LL i'Ve 12345 0.001e-7",
    "def f(x):\n    return x**2  # comment\n\n\tif a!=b: pass",
    "北京是中国的首都。人口2100万,面积16410平方公里!",
    "日本語のテキスト、한국어 텍스트, ไทย, हिन्दी १२३, العربية ١٢٣, עברית, Ελληνικά, Русский",
    "cafe\u0301 \u1100\u1161\u11a8 \ufb01 \u212b \u0958 \u0344",
    "\u2028\u2029\u00a0\u3000\u200b\u200d\ufeff\u0000\u0001\u007f",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e8\U0001f1f3 \u263a\ufe0f",
    "<|im_start|>user\nx<|im_end|>\n<think>\n\n</think>\n\n<|endoftext|><tool_call>",
    "<|im_end|> <|im_end |> <think><think>",
    "\u017f's \u0130'S K'LL n\u2019t",
    "a" * 300 + "!" * 50 + " " * 40 + "_",
    "https://example.org/a?b=c&d=%20e#f /usr/lib/x.so.1 C:\\dir\\file",
    "$x^2+\\frac{a}{b}$ \u2211\u221a\u2260 \u00bd\u00b2\u00b3",
)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Texts as tokens.

    Attributes:
        ids: int32, the texts one after the other.
        lengths: int32, tokens of each text.
    """

    ids: np.ndarray
    lengths: np.ndarray

    def split(self) -> list[np.ndarray]:
        """The tokens of each text."""
        return np.split(self.ids, np.cumsum(self.lengths[:-1], dtype=np.int64)) if len(self.lengths) else []


class Encoder(Protocol):
    """Encodes text without adding special tokens; those written in the text become tokens. Safe to use in threads."""

    name: str

    def encode(self, texts: Sequence[str]) -> Tokens:
        """The tokens of each text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""


class ReferenceEncoder:
    """Hugging Face's `tokenizers`."""

    name = REFERENCE

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> Tokens:
        ids = [e.ids for e in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        lengths = np.fromiter(map(len, ids), np.int32, len(ids))
        flat = np.fromiter((token for one in ids for token in one), np.int32, int(lengths.sum(dtype=np.int64)))
        return Tokens(flat, lengths)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


class FastEncoder:
    """`fastokens`, with `tokenizers` for texts that are not NFC and for occasional checks."""

    name = FAST

    def __init__(self, tokenizer: FlatTokenizer, reference: ReferenceEncoder) -> None:
        self.tokenizer, self.reference, self.batches = tokenizer, reference, itertools.count()

    def encode(self, texts: Sequence[str]) -> Tokens:
        result = self._encode(texts)
        odd = [i for i, text in enumerate(texts) if not text.isascii() and not unicodedata.is_normalized("NFC", text)]
        if odd:
            result = _replaced(result, odd, self.reference.encode([texts[i] for i in odd]))
        if next(self.batches) % _BATCHES_PER_SPOT_CHECK == 0:
            self._spot_check(texts, result)
        return result

    def _spot_check(self, texts: Sequence[str], result: Tokens) -> None:
        short = next((i for i, text in enumerate(texts) if 0 < len(text) <= _LONGEST_SPOT_CHECK), None)
        if short is not None:
            start = int(result.lengths[:short].sum(dtype=np.int64))
            self._compare(texts[short], result.ids[start : start + int(result.lengths[short])])

    def decode(self, ids: Sequence[int]) -> str:
        return self.reference.decode(ids)

    def _encode(self, texts: Sequence[str]) -> Tokens:
        ids, offsets = self.tokenizer.encode_batch_flat(list(texts))
        lengths = np.diff(np.frombuffer(offsets, np.uint64).astype(np.int64)).astype(np.int32)
        return Tokens(np.frombuffer(ids, np.int32), lengths)

    def _compare(self, text: str, ids: np.ndarray) -> None:
        if not np.array_equal(ids, self.reference.encode([text]).ids):
            raise UsageError(
                f"{FAST} and {REFERENCE} disagree on {text[:80]!r}; run again with --tokenizer-backend {REFERENCE}"
            )

    def disagreement(self, texts: Sequence[str]) -> str | None:
        """The first of `texts` that the two libraries encode differently."""
        both = (self._encode(texts).split(), self.reference.encode(texts).split())
        return next((t for t, one, two in zip(texts, *both, strict=True) if not np.array_equal(one, two)), None)


def _replaced(tokens: Tokens, places: Sequence[int], new: Tokens) -> Tokens:
    """`tokens` with the texts at `places` encoded as in `new`."""
    parts, lengths = tokens.split(), tokens.lengths.copy()
    for place, part in zip(places, new.split(), strict=True):
        parts[place], lengths[place] = part, len(part)
    return Tokens(np.concatenate(parts), lengths)


def open_encoder(loading: Loading, *, forced: bool = False) -> Encoder:
    """The fastest correct encoder.

    Args:
        forced: it is an error if the fast library cannot be used.

    Raises:
        UsageError: with `forced`, the fast library cannot be used; or the tokenizer is damaged.
    """
    reference = ReferenceEncoder(loading.reference.result())
    if loading.fast is None:
        return reference
    problem = loading.fast.exception()
    if problem is None:
        encoder = FastEncoder(loading.fast.result(), reference)
        wrong = encoder.disagreement(PROBES)
        if wrong is None:
            return encoder
        problem = ValueError(f"it encodes {wrong!r} differently")
    reason = "it is not installed (pip install fastokens)" if isinstance(problem, ImportError) else str(problem)
    if forced:
        raise UsageError(f"--tokenizer-backend {FAST}: {reason}; use --tokenizer-backend auto")
    log.warning_once(f"tokens are made by {REFERENCE}, which is many times slower than {FAST}: {reason}")
    return reference
