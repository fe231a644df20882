"""Handlers for fine-tuning: conversations -> tokens and labels. Labels are not shifted; -100 is not supervised."""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qwen3_npu.data.blocks import BadRecord, Block, parse
from qwen3_npu.data.encoder import Encoder, Tokens
from qwen3_npu.data.produced import Produced
from qwen3_npu.data.records import Columns
from qwen3_npu.data.templates import Template, Turn, render_pair
from qwen3_npu.data.turns import IGNORED, kept_tokens, limits

CUT, DROPPED, UNSUPERVISED = "over-long samples cut", "over-long samples left out", "samples without anything to learn"


class Style(NamedTuple):
    """How conversations are written.

    Attributes:
        thinking: --enable-thinking.
        longest: most tokens of a sample, its eod included; None: no limit.
        cut: cut longer samples; else leave them out.
        eod: token after each sample, if any.
    """

    template: Template
    thinking: bool | None
    longest: int | None
    cut: bool
    eod: int | None


class ConversationHandler(abc.ABC):
    """The part that instruction and pairwise handlers share: records to conversations."""

    outputs: Sequence[str] = ()

    def __init__(
        self, read: Callable[[Mapping[str, Any], Columns], Any], columns: Columns, style: Style, encoder: Encoder
    ) -> None:
        self.read, self.names, self.style, self.encoder = read, columns, style, encoder
        self.columns: Sequence[str] = columns.all()

    @abc.abstractmethod
    def __call__(self, block: Block) -> Produced:
        """The documents of a block."""

    def conversations(self, block: Block, counts: Counter[str]) -> tuple[list[tuple[int, Any]], list[BadRecord]]:
        """The conversations (or pairs) of a block with their record numbers, and the records that hold none."""
        records, bad = parse(block)
        found = []
        for number, record in records:
            for what in self.names.unused(record):
                counts[f"records with a {what} that is not used"] += 1
            try:
                found.append((number, self.read(record, self.names)))
            except ValueError as error:
                bad.append(BadRecord(block.file, number, str(error)))
        return found, bad


class InstructionHandler(ConversationHandler):
    """input_ids, attention_mask (ones) and labels of each conversation."""

    outputs = ("packed_input_ids", "packed_attention_mask", "packed_labels")

    def __call__(self, block: Block) -> Produced:
        counts: Counter[str] = Counter()
        conversations, bad = self.conversations(block, counts)
        samples: list[list[Turn]] = []
        for number, conversation in conversations:
            try:
                samples.append(self.style.template.render(conversation, self.style.thinking, False))
            except ValueError as error:
                bad.append(BadRecord(block.file, number, str(error)))
        ids, labels = self.tokens(samples, counts)
        ones = Tokens(np.ones(len(ids.ids), np.int32), ids.lengths)
        outputs = dict(zip(self.outputs, (ids, ones, labels), strict=True))
        return Produced(outputs, len(block.numbers), counts, sorted(bad, key=lambda b: b.number))

    def tokens(self, samples: Sequence[Sequence[Turn]], counts: Counter[str]) -> tuple[Tokens, Tokens]:
        """Samples as (input_ids, labels); `counts` tells what was cut or left out."""
        texts: list[str] = []
        pieces: list[int] = []  # strings of each source and each target, in turn
        for turns in samples:
            for source, target in turns:
                texts += source
                texts += target
                pieces += (len(source), len(target))
        encoded = self.encoder.encode(texts)
        sizes = _sums(encoded.lengths, np.array(pieces, np.int64)).reshape(-1, 2)
        learned = np.repeat(np.tile([False, True], len(sizes)), sizes.reshape(-1))
        labels = np.where(learned, encoded.ids, np.int32(IGNORED))
        return self._fitted(encoded.ids, labels, sizes, np.array([len(turns) for turns in samples], np.int64), counts)

    def _fitted(
        self, ids: np.ndarray, labels: np.ndarray, sizes: np.ndarray, turns: np.ndarray, counts: Counter[str]
    ) -> tuple[Tokens, Tokens]:
        """Every sample within the limit, with something to learn, and its eod.

        Args:
            sizes: [turns, 2], tokens of the source and of the target of each turn.
            turns: of each sample.
        """
        style = self.style
        eod = [] if style.eod is None else [style.eod]
        room = None if style.longest is None else style.longest - len(eod)
        lengths, supervised = _sums(sizes.sum(axis=1), turns), _sums(sizes[:, 1], turns)
        if not eod and supervised.all() and (room is None or lengths.max(initial=0) <= room):
            return Tokens(ids, lengths), Tokens(labels, lengths)
        starts, first = (np.concatenate(([0], np.cumsum(each, dtype=np.int64))) for each in (lengths, turns))
        kept: list[tuple[np.ndarray, np.ndarray]] = []
        for i in range(len(turns)):
            sample = ids[starts[i] : starts[i + 1]], labels[starts[i] : starts[i + 1]]
            if room is not None and lengths[i] > room:
                counts[CUT if style.cut else DROPPED] += 1
                if style.cut:
                    where = kept_tokens(sizes[first[i] : first[i + 1]].tolist(), room)
                    sample = sample[0][where], sample[1][where]
            if room is None or len(sample[0]) <= room:
                if (sample[1] != IGNORED).any():
                    kept.append(sample)
                else:
                    counts[UNSUPERVISED] += 1
        end = np.array(eod, np.int32)
        kept_lengths = np.array([len(sample) + len(eod) for sample, _ in kept], np.int32)
        both = [[part for sample in kept for part in (sample[which], end)] for which in (0, 1)]
        joined = [np.concatenate(parts) if parts else end[:0] for parts in both]
        return Tokens(joined[0], kept_lengths), Tokens(joined[1], kept_lengths)


def _sums(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Sums over runs of `sizes` values, int32."""
    totals = np.concatenate(([0], np.cumsum(values, dtype=np.int64)))
    ends = np.cumsum(sizes, dtype=np.int64)
    return (totals[ends] - totals[ends - sizes]).astype(np.int32)


class PairwiseHandler(ConversationHandler):
    """chosen and rejected answers to the same prompt, each as ids and labels."""

    outputs = (
        "packed_chosen_input_ids",
        "packed_chosen_labels",
        "packed_rejected_input_ids",
        "packed_rejected_labels",
    )

    def __call__(self, block: Block) -> Produced:
        counts: Counter[str] = Counter()
        pairs, bad = self.conversations(block, counts)
        texts: list[str] = []
        pieces: list[int] = []
        for number, pair in pairs:
            try:
                prompt, answers = render_pair(pair, self.style.template, self.style.thinking)
            except ValueError as error:
                bad.append(BadRecord(block.file, number, str(error)))
                continue
            for part in (prompt, *answers):
                texts += part
                pieces.append(len(part))
        encoded = self.encoder.encode(texts)
        lengths = _sums(encoded.lengths, np.array(pieces, np.int64))
        parts = np.split(encoded.ids, np.cumsum(lengths[:-1], dtype=np.int64)) if len(lengths) else []
        columns: dict[str, list[np.ndarray]] = {name: [] for name in self.outputs}
        for row in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            if fitted := self._fitted(*row, counts):
                for name, array in zip(self.outputs, fitted, strict=True):
                    columns[name].append(array)
        outputs = {name: _joined(arrays) for name, arrays in columns.items()}
        return Produced(outputs, len(block.numbers), counts, sorted(bad, key=lambda b: b.number))

    def _fitted(
        self, prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, counts: Counter[str]
    ) -> list[np.ndarray]:
        longest = self.style.longest
        answer = max(len(chosen), len(rejected))
        if longest is not None and len(prompt) + answer > longest:
            counts[CUT if self.style.cut else DROPPED] += 1
            if not self.style.cut:
                return []
            keep = limits(len(prompt), answer, longest)
            prompt, chosen, rejected = prompt[: keep.source], chosen[: keep.target], rejected[: keep.target]
        masked = np.full(len(prompt), IGNORED, np.int32)
        return [np.concatenate(both) for answer in (chosen, rejected) for both in ((prompt, answer), (masked, answer))]


def _joined(arrays: Sequence[np.ndarray]) -> Tokens:
    lengths = np.fromiter(map(len, arrays), np.int32, len(arrays))
    return Tokens(np.concatenate(arrays) if arrays else np.zeros(0, np.int32), lengths)
