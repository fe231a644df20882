"""The record of a token file: the range of its ids and the settings that made it. No torch.

`<prefix>.record.json` lies beside each .bin/.idx pair that this project writes:

    {"version": 1, "files": {".bin": [bytes, time], ".idx": [bytes, time]},
     "ids": {"tokens": N, "ignored": N, "smallest": id or null, "largest": id or null},
     "made": {"tokenizer": digest, ..}}

If it is missing (Megatron's and MindSpeed-LLM's files have none), or the files have changed since, all tokens are read
once, and the record is stored in the data cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qwen3_npu import log, schema
from qwen3_npu.errors import UsageError
from qwen3_npu.files import write_text
from qwen3_npu.progress import Progress

IGNORED = -100  # the label of a token that is not supervised
_VERSION = 1
_SCANNED = 4 << 20  # tokens read at a time


@dataclasses.dataclass(frozen=True)
class IdRange:
    """The ids of a file.

    Attributes:
        tokens: number of all ids.
        ignored: number of ids that are `IGNORED`.
        smallest, largest: of the other ids; None if there is none.
    """

    tokens: int = 0
    ignored: int = 0
    smallest: int | None = None
    largest: int | None = None

    @staticmethod
    def of(tokens: np.ndarray) -> IdRange:
        """The range of an array of ids."""
        if not len(tokens):
            return IdRange()
        smallest = int(tokens.min())
        ignored = 0
        if smallest < 0:
            learned = tokens[tokens != IGNORED]
            ignored = len(tokens) - len(learned)
            if not len(learned):
                return IdRange(len(tokens), ignored)
            smallest = int(learned.min())
        return IdRange(len(tokens), ignored, smallest, int(tokens.max()))

    def __add__(self, other: IdRange) -> IdRange:
        found = [r for r in (self, other) if r.smallest is not None and r.largest is not None]
        return IdRange(
            self.tokens + other.tokens,
            self.ignored + other.ignored,
            min((r.smallest for r in found if r.smallest is not None), default=None),
            max((r.largest for r in found if r.largest is not None), default=None),
        )


@dataclasses.dataclass(frozen=True)
class TokenRecord:
    """The record of one .bin/.idx pair.

    Attributes:
        made: "tokenizer" (`TokenizerFolder.identity`) and other settings that change the tokens; empty if unknown.
    """

    ids: IdRange
    made: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def write(self, path: Path, prefix: str) -> None:
        """Write it atomically. The pair must have its final names. Raises: OSError."""
        content = {"version": _VERSION, "files": _files(prefix), "ids": vars(self.ids), "made": dict(self.made)}
        write_text(path, json.dumps(content), concurrent=True)


def record_path(prefix: str) -> Path:
    """The path of a pair's record."""
    return Path(prefix + ".record.json")


def find_record(prefix: str, path: Path | None = None) -> TokenRecord | None:
    """The record beside a pair; None if there is none, or the files have changed since it was written.

    Args:
        path: of the record, if it is not beside the pair.
    """
    path = path or record_path(prefix)
    if not path.exists():
        return None
    try:
        content = schema.read_record(path)
        if content.integer("version") != _VERSION:
            return None  # a later release has written it
        if content.record("files").fields != _files(prefix):
            return None
        ids = content.record("ids")
        found = IdRange(
            tokens=ids.integer("tokens", least=0),
            ignored=ids.integer("ignored", least=0),
            smallest=ids.integer("smallest", None),
            largest=ids.integer("largest", None),
        )
        made = content.record("made", None)
        return TokenRecord(found, made.fields if made else {})
    except UsageError as error:
        log.warning_once(f"{error}; it is not used")
        return None


def scanned_record(prefix: str, tokens: np.ndarray, cache: Path) -> TokenRecord:
    """The record of a pair: the file beside it, the one in the cache, or a new one, for which all tokens are read.

    Args:
        tokens: all of the pair, in any order.
        cache: folder in which the result of reading is kept.
    """
    kept = cache / f"ids-{hashlib.sha256(os.path.realpath(prefix).encode()).hexdigest()[:24]}.json"
    found = find_record(prefix) or find_record(prefix, kept)
    if found is not None:
        return found
    found = TokenRecord(_scan(prefix, tokens))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        found.write(kept, prefix)
    except OSError as error:
        log.info(
            f"{cache} cannot be written ({error.strerror}), so the next start reads all of {prefix}.bin again; "
            f"give --data-cache-path"
        )
    return found


def _scan(prefix: str, tokens: np.ndarray) -> IdRange:
    ids = IdRange()
    progress = Progress(f"ids of {prefix}", len(tokens), {"tokens": "tokens"})
    for start in range(0, len(tokens), _SCANNED):
        part = tokens[start : start + _SCANNED]
        ids += IdRange.of(part)
        progress.add(tokens=len(part))
    if len(tokens) > 16 * _SCANNED:
        progress.close()
    return ids


def check_ids(prefix: str, ids: IdRange, vocab_size: int, *, labels: bool = False) -> None:
    """Check that every id has a row in the model's vocabulary.

    Args:
        labels: `IGNORED` is allowed.

    Raises:
        UsageError: an id has none.
    """
    if ids.largest is not None and ids.largest >= vocab_size:
        raise UsageError(
            f"--data-path {prefix} holds token {ids.largest}, but the model's vocabulary has {vocab_size} rows: "
            f"it was made with another tokenizer; preprocess it with the model's"
        )
    smallest = ids.smallest if labels or not ids.ignored else min(IGNORED, ids.smallest or 0)
    if smallest is not None and smallest < 0:
        allowed = f"{IGNORED} and ids from 0 to {vocab_size - 1}" if labels else f"ids from 0 to {vocab_size - 1}"
        raise UsageError(f"--data-path {prefix} holds {smallest}; {allowed} are allowed there; preprocess it again")


def _files(prefix: str) -> dict[str, list[int]]:
    """Sizes and times of the pair."""
    stats = {end: os.stat(prefix + end) for end in (".bin", ".idx")}
    return {end: [stat.st_size, stat.st_mtime_ns] for end, stat in stats.items()}
