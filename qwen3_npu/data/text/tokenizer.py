"""Tokenizer folders: their special tokens, and their libraries, which are loaded while the program starts.

Imports nothing large: in a small run loading takes most of the time, so it must begin before numpy is imported.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from qwen3_npu import schema
from qwen3_npu.errors import UsageError, printable
from qwen3_npu.once import once_a_node, shared_record

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# This is a key of the object: inside a string of JSON, quotes have a backslash.
_ADDED_TOKENS = re.compile(r'"added_tokens"\s*:\s*\[')
FAST, REFERENCE = "fastokens", "tokenizers"
IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


class FlatTokenizer(Protocol):
    """The method of fastokens' tokenizer that is used here."""

    def encode_batch_flat(self, texts: list[str]) -> tuple[bytes, bytes]:
        """All ids (int32), and where each text begins and the last one ends (uint64)."""


@dataclasses.dataclass(frozen=True)
class TokenizerFolder:
    """A Hugging Face tokenizer folder.

    Attributes:
        special: token -> number of every added token (`<|im_end|>`, `<think>`, ...).
        config: tokenizer_config.json.
        unspoken: numbers of the tokens that decoders omit (`<|im_end|>`, not `<think>`): "special" in tokenizer.json.
    """

    path: Path
    special: Mapping[str, int]
    config: Mapping[str, object]
    unspoken: frozenset[int] = frozenset()

    @property
    def json_path(self) -> str:
        return str(self.path / "tokenizer.json")

    def id(self, token: str, why: str) -> int:
        """The number of a special token.

        Raises:
            UsageError: the tokenizer lacks it; `why` names the feature that needs it.
        """
        if token not in self.special:
            raise UsageError(
                f"--tokenizer-name-or-path {self.path}: it has no token {token}, which {why} needs; "
                f"give the folder of a Qwen3 model"
            )
        return self.special[token]

    def named(self, name: str) -> str | None:
        """`eos_token` or another role -> its text, if the folder gives it one. Raises: UsageError: it gives no text."""
        token = self.config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return None if token is None else schema.text(token, f"{self.path / 'tokenizer_config.json'}: {name}")

    def eos(self) -> int:
        """The number of the end-of-document token, as Megatron and MindSpeed-LLM append it: `eos_token`.

        For a Qwen3 chat tokenizer that is `<|im_end|>`, for a Base one `<|endoftext|>`.
        """
        token = self.named("eos_token")
        if token is None:
            raise UsageError(f"--append-eod: {self.path / 'tokenizer_config.json'} names no eos_token")
        return self.id(token, "--append-eod")

    def pad(self) -> int:
        """The number of the padding token; `<|endoftext|>` where none is named."""
        return self.id(self.named("pad_token") or END_OF_TEXT, "padding")

    @functools.cached_property
    def largest_id(self) -> int:
        """The largest number of a token. Raises: UsageError: tokenizer.json has no vocabulary."""
        numbers = [*self.special.values()]
        vocabulary = schema.read_record(self.json_path).record("model").fields.get("vocab")
        if isinstance(vocabulary, dict):
            numbers += [number for number in vocabulary.values() if isinstance(number, int)]
        if not numbers:
            raise UsageError(f"--tokenizer-name-or-path {self.path}: tokenizer.json has no vocabulary")
        return max(numbers)

    @functools.cached_property
    def identity(self) -> str:
        """A digest that changes when the tokenizer does."""
        digest = hashlib.sha256(Path(self.json_path).read_bytes())
        digest.update(json.dumps(self.config, sort_keys=True).encode())
        return digest.hexdigest()


def _added_tokens(path: Path) -> str:
    """Of a tokenizer.json, as JSON. Parses nothing else: the vocabulary takes a tenth of a second.

    Raises:
        KeyError, ValueError: there are none.
        UsageError: see `schema.read_small`.
    """
    text = schema.read_small(path).decode("utf-8")
    key = _ADDED_TOKENS.search(text)
    if key is None:
        raise KeyError("added_tokens")
    return json.dumps(json.JSONDecoder().raw_decode(text, key.end() - 1)[0])


def open_tokenizer(path: str) -> TokenizerFolder:
    """Read a tokenizer folder.

    Raises:
        UsageError: it is not there, or not a tokenizer.
    """
    folder = Path(path)
    file = folder / "tokenizer.json"
    config_file = folder / "tokenizer_config.json"
    try:
        added = json.loads(once_a_node("added tokens", file, _added_tokens))
        numbers = {token["content"]: schema.integer(token["id"], "id", least=0, most=2**31) for token in added}
        unspoken = frozenset(numbers[token["content"]] for token in added if token.get("special") is True)
        config = shared_record(config_file).fields if config_file.exists() else {}
    except (ValueError, KeyError, TypeError, RecursionError, UsageError) as error:
        reason = printable(str(error)) or type(error).__name__
        raise UsageError(f"--tokenizer-name-or-path {path}: not a tokenizer ({reason})") from None
    return TokenizerFolder(folder, numbers, config, unspoken)


class Loading(NamedTuple):
    """Libraries that are being loaded.

    Attributes:
        reference: a tokenizers.Tokenizer.
        fast: a fastokens.Tokenizer, or the exception that prevents its use; None if it is not wanted.
    """

    reference: Future[Tokenizer]
    fast: Future[FlatTokenizer] | None


def start_loading(folder: str, backend: str = "auto", threads: int | None = None) -> Loading:
    """Start to load a tokenizer folder.

    Args:
        backend: "auto", or the name of a library.
        threads: number for libraries that use their own threads; None: number of CPUs.

    Raises:
        UsageError: there is no tokenizer.json.
    """
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        found = "holds no tokenizer.json" if Path(folder).is_dir() else "is not a folder"
        raise UsageError(f"--tokenizer-name-or-path {folder}: {found}; give the folder of a downloaded Qwen3 model")
    threads = threads or available_cpus()
    # Both libraries read these when they first encode.
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if threads > 1 else "false")
    pool = ThreadPoolExecutor(2)
    # The slower one to load first.
    fast = pool.submit(_load_fast, str(file)) if backend != REFERENCE else None
    reference = pool.submit(_load_reference, str(file))
    pool.shutdown(wait=False)
    return Loading(reference, fast)


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS lacks it


def _load_reference(file: str) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(file)
    except Exception as error:  # tokenizers raises no narrower type
        raise UsageError(f"{file} cannot be used as a tokenizer: {error}") from None


def _load_fast(file: str) -> FlatTokenizer:
    from fastokens import Tokenizer

    return Tokenizer.from_file(file)
