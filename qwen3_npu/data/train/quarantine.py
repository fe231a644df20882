"""The quarantine: samples that a training leaves out after a spike. `quarantine.jsonl` is in its --save. No torch.

The order of all other samples does not change: those after an omitted sample move up by one. The omitted samples depend
on this file and the data only, so they are the same in any layout and after every resume.

A line of the file is one sample:

    {"key": "9f0c...", "action": "left out", "step": 1200, "reason": "loss 9.1 is above 4.2", "number": 9593,
     "first": 9592, "file": "data/part_0_text_document", "sample": 311, "offset": 0, "ids": [...], "learned": [...],
     "excerpt": "..."}

`number` is the number of the sample if none were omitted. The sample is omitted from number `first` on. `sample` and
`offset` are its place in the file (for text: a document and a token). `ids` and `learned` hold the first 256 tokens.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwen3_npu import log, schema
from qwen3_npu.data.train.token_record import IGNORED
from qwen3_npu.files import write_text

FILE = "quarantine.jsonl"
LEFT_OUT, NOTED = "left out", "noted"
_SHOWN = 256  # tokens that an entry shows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quarantined:
    """One sample; see the module."""

    key: str
    action: str
    step: int
    reason: str
    number: int
    first: int
    file: str
    sample: int
    offset: int
    ids: tuple[int, ...]
    learned: tuple[int, ...]
    excerpt: str


class Place(NamedTuple):
    """The place of a sample: an index, or for text a document and a token."""

    file: str
    sample: int
    offset: int = 0


def content(sample: object) -> list[tuple[np.ndarray, np.ndarray]]:
    """The token ids of a sample and whether each is learned: one pair, or one for each answer of a preference."""
    if isinstance(sample, dict):  # text: the label of a place is the next token
        return [(np.asarray(sample["tokens"]), np.asarray(sample["loss_mask"]) > 0)]
    if hasattr(sample, "ids") and hasattr(sample, "labels"):
        return [(sample.ids, sample.labels != IGNORED)]
    answers = [getattr(sample, name) for name in ("chosen", "rejected", "answer") if hasattr(sample, name)]
    return [pair for answer in answers for pair in content(answer)]


def sample_key(sample: object) -> str:
    """A digest of a sample's content."""
    found = hashlib.sha256()
    for ids, learned in content(sample):
        found.update(np.ascontiguousarray(ids, np.int64).tobytes() + np.packbits(learned).tobytes() + b"|")
    return found.hexdigest()[:32]


class Ordered:
    """The samples of a training in order, without those in quarantine.

    Args:
        dataset: number -> sample; its `locate` gives the place of a number.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.repeats = hasattr(dataset, "shares")  # every epoch has the same samples; samples of text are divided anew
        self.rules: dict[object, int] = {}  # place (of text: number) -> the number that it is left out from
        self.skipped: list[int] = []  # numbers that are left out, of those before `scanned`
        self.scanned = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> object:
        return getattr(self.dataset, name)

    def __getitem__(self, number: int) -> object:
        return self.dataset[self.raw(number)]

    def locate(self, number: int) -> tuple:
        """The place of sample `number` of this order."""
        return self.dataset.locate(self.raw(number))

    def raw(self, number: int) -> int:
        """The number of sample `number` in the order without omissions."""
        if not self.rules:
            return number
        while self.scanned - len(self.skipped) <= number:
            if self.scanned >= self.rules.get(self._rule(self.scanned), self.scanned + 1):
                self.skipped.append(self.scanned)
            self.scanned += 1
        before = bisect.bisect_right([place - i for i, place in enumerate(self.skipped)], number)
        return number + before

    def _rule(self, number: int) -> object:
        return self.dataset.locate(number) if self.repeats else number

    def leave_out(self, numbers: Sequence[int], first: int) -> None:
        """Omit these samples from number `first` on. The numbers are those of the order without omissions."""
        for number in numbers:
            rule = self._rule(number)
            self.rules[rule] = min(first, self.rules.get(rule, first))
        start = min(self.rules.values())
        self.skipped = [place for place in self.skipped if place < start]
        self.scanned = start

    def entry(self, number: int, decode: Callable[[Sequence[int]], str] | None = None, **why: Any) -> Quarantined:
        """The entry of a sample for the file.

        Args:
            number: its number in the order without omissions.
            why: the other fields.
        """
        sample, place = self.dataset[number], Place(*self.dataset.locate(number))
        ids, learned = (np.concatenate(parts)[:_SHOWN].tolist() for parts in zip(*content(sample), strict=True))
        return Quarantined(
            key=sample_key(sample),
            number=number,
            ids=tuple(ids),
            learned=tuple(map(int, learned)),
            excerpt=decode(ids) if decode else "",
            **place._asdict(),
            **why,
        )

    def resolve(self, entries: Sequence[Quarantined]) -> list[str]:
        """Omit the samples of a file. Returns a warning for each sample that is not at its place in these data."""
        missing = []
        for entry in (one for one in entries if one.action == LEFT_OUT):
            try:
                is_there = sample_key(self.dataset[entry.number]) == entry.key
            except IndexError:  # this training has fewer samples
                is_there = False
            if is_there:
                self.leave_out([entry.number], entry.first)
            else:
                missing.append(
                    f"{FILE}: sample {entry.key} (step {entry.step}) is not where it was in these data; it "
                    f"is not left out"
                )
        return missing


def read(folder: Path) -> list[Quarantined]:
    """The entries of a folder's file; empty if there is no file. Raises: UsageError: it is damaged."""
    path = folder / FILE if folder.is_dir() else folder
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(schema.read_small(path).splitlines(), start=1):
        record = schema.record(schema.parse_json(line, f"{path}, line {number}"), f"{path}, line {number}")
        record.only([field.name for field in dataclasses.fields(Quarantined)])
        found.append(
            Quarantined(
                step=record.integer("step", least=0),
                number=record.integer("number", least=0),
                first=record.integer("first", least=0),
                sample=record.integer("sample", least=0),
                offset=record.integer("offset", least=0),
                key=record.text("key"),
                action=record.text("action"),
                reason=record.text("reason"),
                file=record.text("file"),
                excerpt=record.text("excerpt"),
                ids=record.counts("ids"),
                learned=record.counts("learned"),
            )
        )
    return found


def write(folder: Path, entries: Sequence[Quarantined]) -> None:
    """Write all entries atomically."""
    write_text(
        folder / FILE, "".join(json.dumps(dataclasses.asdict(one), ensure_ascii=False) + "\n" for one in entries)
    )


def warn(lines: Sequence[str]) -> None:
    """Log the first warnings and the number of the others."""
    for line in lines[:3]:
        log.warning(line)
    if len(lines) > 3:
        log.warning(f"{FILE}: and {len(lines) - 3} more")
