"""Handlers for fine-tuning: conversations -> tokens and labels. Labels are not shifted; -100 is not supervised."""

from __future__ import annotations

import abc
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from qwen3_npu.data.preprocess.handler import BlockSummary, Prepared
from qwen3_npu.data.preprocess.record_formats import Columns
from qwen3_npu.data.read.blocks import BadRecord, RecordBlock, parse_block
from qwen3_npu.data.text.conversation import ASSISTANT, Conversation, Judged, PreferencePair
from qwen3_npu.data.text.encoder import Tokens
from qwen3_npu.data.text.templates import Template, render_answer, render_pair
from qwen3_npu.data.train.token_record import IGNORED
from qwen3_npu.data.train.turns import kept_tokens, limits

THOUGHTS = "answers with thoughts"
MASKED = "answers that are not learned, as the data say"
LEFT_OUT = "records left out, as they say"
TRUNCATED, DROPPED = "over-long samples truncated", "over-long samples left out"
UNSUPERVISED = "samples without anything to learn"

# The output of labelled answers that says whether each is desirable: 1 or 0.
LABEL = "packed_answer_desirable"


class Style(NamedTuple):
    """How conversations become tokens.

    Attributes:
        thinking: --enable-thinking.
        longest: maximum number of tokens of a sample, its eod included; None: no limit.
        truncates: truncate longer samples; else omit them.
        eod: token after each sample, if any.
    """

    template: Template
    thinking: bool | None
    longest: int | None
    truncates: bool
    eod: int | None


Sample = TypeVar("Sample", Conversation, PreferencePair, Judged)  # what a record is read as


class ConversationHandler(abc.ABC, Generic[Sample]):
    """Base class of the handlers of conversations: records to strings.

    Attributes:
        kind: type of the samples.
        look: (conversation or pair) -> warnings; set by --check.
    """

    outputs: Sequence[str] = ()
    kind: type[Sample]
    look: Callable[[Sample], Iterable[str]] | None = None

    def __init__(self, read: Callable[[Mapping[str, object], Columns], Sample], columns: Columns, style: Style) -> None:
        self.read: Callable[[Mapping[str, object], Columns], Sample] = read
        self.names, self.style = columns, style
        self.columns: Sequence[str] = columns.all()

    @abc.abstractmethod
    def pieces(self, conversation: Sample) -> Iterable[list[str]]:
        """A conversation (or pair) as parts, each a list of strings that are encoded one by one. Raises: ValueError:
        it has none.
        """

    @abc.abstractmethod
    def documents(self, prepared: Prepared, tokens: Tokens) -> Mapping[str, Tokens]:
        """The documents of each output; the layout is (strings of each part, parts and `tag` of each sample)."""

    def tag(self, conversation: Sample) -> int:
        """A number that `documents` needs beside the tokens of a sample."""
        return 0

    def prepare(self, block: RecordBlock) -> Prepared:
        """The strings of a block."""
        records, bad = parse_block(block)
        texts: list[str] = []
        strings: list[int] = []
        pieces: list[int] = []
        tags: list[int] = []
        counts: Counter[str] = Counter()
        warnings: dict[str, list[int]] = {}
        for number, record in records:
            for what in self.names.unused(record):
                counts[f"records with a {what} that is not used"] += 1
            for what in set(self.names.unknown(record)) if self.look else ():
                warnings.setdefault(what, []).append(number)
            if self.names.leaves_out(record):
                counts[LEFT_OUT] += 1
                continue
            before = len(strings)
            try:
                conversation = self.read(record, self.names)
                if not isinstance(conversation, self.kind):
                    given, wanted = type(conversation).__name__, self.kind.__name__
                    raise ValueError(f"{self.read.__name__}() of the handler returned a {given}, not a {wanted}")
                _count(conversation, counts)
                for text in set(self.look(conversation)) if self.look else ():
                    warnings.setdefault(text, []).append(number)
                for piece in self.pieces(conversation):
                    texts += piece
                    strings.append(len(piece))
            except ValueError as error:
                bad.append(BadRecord(block.file, number, str(error)))
            else:
                pieces.append(len(strings) - before)
                tags.append(self.tag(conversation))
        layout = np.array(strings, np.int64), np.array(pieces, np.int64), np.array(tags, np.int32)
        bad.sort(key=lambda b: b.number)
        return Prepared(texts, layout, BlockSummary(len(block.numbers), counts, bad, warnings))


class InstructionHandler(ConversationHandler[Conversation]):
    """input_ids, attention_mask (ones) and labels of each conversation."""

    outputs = ("packed_input_ids", "packed_attention_mask", "packed_labels")
    kind = Conversation

    def pieces(self, conversation: Conversation) -> Iterable[list[str]]:
        """The source and the target of each turn."""
        return itertools.chain.from_iterable(self.style.template.render(conversation, self.style.thinking, False))

    def documents(self, prepared: Prepared, tokens: Tokens) -> Mapping[str, Tokens]:
        strings, pieces, _ = prepared.layout
        sizes = _sums(tokens.lengths, strings).reshape(-1, 2)
        learned = np.repeat(np.tile([False, True], len(sizes)), sizes.reshape(-1))
        labels = np.where(learned, tokens.ids, np.int32(IGNORED))
        kept, kept_labels = self._fitted(tokens.ids, labels, sizes, pieces // 2, counts=prepared.summary.counts)
        ones = Tokens(np.ones(len(kept.ids), np.int32), kept.lengths)
        return dict(zip(self.outputs, (kept, ones, kept_labels), strict=True))

    def _fitted(
        self, ids: np.ndarray, labels: np.ndarray, sizes: np.ndarray, turns: np.ndarray, *, counts: Counter[str]
    ) -> tuple[Tokens, Tokens]:
        """The samples that have tokens to learn, truncated to the limit, with their eod.

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
                counts[TRUNCATED if style.truncates else DROPPED] += 1
                if style.truncates:
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


def _count(conversation: Conversation | PreferencePair | Judged, counts: Counter[str]) -> None:
    """Count answers with thoughts, answers that the data say not to learn, and desirable and undesirable answers."""
    if isinstance(conversation, Judged):
        counts[f"{'desirable' if conversation.desirable else 'undesirable'} answers"] += 1
    for message in conversation.messages if isinstance(conversation, Conversation) else ():
        if message.role == ASSISTANT:
            if not message.learned:
                counts[MASKED] += 1
            if message.has_thought():
                counts[THOUGHTS] += 1


def _sums(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Sums over runs of `sizes` values, int32."""
    totals = np.concatenate(([0], np.cumsum(values, dtype=np.int64)))
    ends = np.cumsum(sizes, dtype=np.int64)
    return (totals[ends] - totals[ends - sizes]).astype(np.int32)


class PairwiseHandler(ConversationHandler[PreferencePair]):
    """chosen and rejected answers to the same prompt, each as ids and labels."""

    outputs = (
        "packed_chosen_input_ids",
        "packed_chosen_labels",
        "packed_rejected_input_ids",
        "packed_rejected_labels",
    )
    kind = PreferencePair

    def pieces(self, conversation: PreferencePair) -> Iterable[list[str]]:
        """The prompt and both answers."""
        prompt, answers = render_pair(conversation, self.style.template, self.style.thinking)
        return prompt, *answers

    def documents(self, prepared: Prepared, tokens: Tokens) -> Mapping[str, Tokens]:
        strings, _, _ = prepared.layout
        lengths = _sums(tokens.lengths, strings)
        parts = Tokens(tokens.ids, lengths).split()
        columns: dict[str, list[np.ndarray]] = {name: [] for name in self.outputs}
        for row in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            if fitted := _fitted(self.style, row[0], row[1:], prepared.summary.counts):
                for name, array in zip(self.outputs, fitted, strict=True):
                    columns[name].append(array)
        return {name: _joined(arrays) for name, arrays in columns.items()}


class KtoHandler(ConversationHandler[Judged]):
    """An answer to a prompt as ids and labels, and whether it is desirable: one number, 1 or 0."""

    outputs = ("packed_answer_input_ids", "packed_answer_labels", LABEL)
    kind = Judged

    def pieces(self, conversation: Judged) -> Iterable[list[str]]:
        """The prompt and the answer."""
        *prompt, answer = conversation.conversation.messages
        if not answer.learned:
            raise ValueError("the answer is labelled, but the data say not to learn it")
        return render_answer(
            conversation.conversation._replace(messages=tuple(prompt)),
            answer,
            self.style.template,
            self.style.thinking,
        )

    def tag(self, conversation: Judged) -> int:
        """1: desirable."""
        return int(conversation.desirable)

    def documents(self, prepared: Prepared, tokens: Tokens) -> Mapping[str, Tokens]:
        strings, _, tags = prepared.layout
        parts = Tokens(tokens.ids, _sums(tokens.lengths, strings)).split()
        columns: tuple[list[np.ndarray], ...] = ([], [], [])
        for prompt, answer, tag in zip(parts[::2], parts[1::2], tags, strict=True):
            if fitted := _fitted(self.style, prompt, [answer], prepared.summary.counts):
                for column, array in zip(columns, (*fitted, np.array([tag], np.int32)), strict=True):
                    column.append(array)
        return dict(zip(self.outputs, map(_joined, columns), strict=True))


def _fitted(style: Style, prompt: np.ndarray, answers: Sequence[np.ndarray], counts: Counter[str]) -> list[np.ndarray]:
    """Ids and labels of each answer after the prompt, within the limit; empty if the sample is omitted."""
    longest, answer = style.longest, max(map(len, answers))
    if longest is not None and len(prompt) + answer > longest:
        counts[TRUNCATED if style.truncates else DROPPED] += 1
        if not style.truncates:
            return []
        keep = limits(len(prompt), answer, longest)
        if keep.target == 0:
            counts[UNSUPERVISED] += 1
            return []
        prompt, answers = prompt[: keep.source], [answer[: keep.target] for answer in answers]
    masked = np.full(len(prompt), IGNORED, np.int32)
    return [np.concatenate(both) for answer in answers for both in ((prompt, answer), (masked, answer))]


def _joined(arrays: Sequence[np.ndarray]) -> Tokens:
    lengths = np.fromiter(map(len, arrays), np.int32, len(arrays))
    return Tokens(np.concatenate(arrays) if arrays else np.zeros(0, np.int32), lengths)
