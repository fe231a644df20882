"""`--check` and `--show`: show the samples that would be written, and write nothing."""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np

from qwen3_npu import log
from qwen3_npu.args.preprocess import PreprocessArgs
from qwen3_npu.data.preprocess.answer_lengths import AnswerLengths
from qwen3_npu.data.preprocess.handler import Handler, Produced, produce
from qwen3_npu.data.preprocess.pipeline import Totals, documents
from qwen3_npu.data.preprocess.sft_handler import DROPPED, LABEL, TRUNCATED, UNSUPERVISED, ConversationHandler
from qwen3_npu.data.read.blocks import RecordBlock, first
from qwen3_npu.data.read.open import Inputs
from qwen3_npu.data.text.conversation import (
    ASSISTANT,
    END_THINK,
    NO_THOUGHT,
    THINK,
    Conversation,
    Judged,
    Message,
    PreferencePair,
)
from qwen3_npu.data.text.encoder import Encoder, Tokens
from qwen3_npu.data.train.token_record import IGNORED
from qwen3_npu.errors import UsageError, printable

_GIVEN, _LEARNED, _PLAIN = "\033[2m", "\033[1;32m", "\033[0m"
_BAR = 40
_CONTROL = re.compile(r"<\|(?:im_start|im_end|endoftext)\|>")
_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>")
# An answer of some length that stops at a letter, a comma or an opening bracket.
_LONG = 300
_OPEN_END = re.compile(r"[A-Za-z,(\[{]$")


def check(args: PreprocessArgs, inputs: Inputs, handler: Handler, encoder: Future[Encoder]) -> int:
    """Show samples, statistics and warnings; the exit status: 1 with --strict and a warning.

    Raises:
        UsageError: as in writing.
    """
    if args.check.show:
        blocks = first(inputs.blocks(handler.columns), args.records.max_samples)
        _show(blocks, handler, encoder.result(), args.check.show)
    if not args.check.check:
        return 0
    totals, lengths, supervised, hashes = Totals(), _GrowingArray(), _GrowingArray(), _GrowingArray(np.uint64)
    answers = AnswerLengths()
    warnings: Counter[str] = Counter()
    places: dict[str, str] = {}
    if isinstance(handler, ConversationHandler):
        handler.look = functools.partial(lint, thinking=handler.style.thinking)
        handler.columns = ()  # read all columns, to tell which are not used
    for block, produced in documents(args, inputs, handler, encoder, totals=totals):
        for text, numbers in produced.summary.warnings.items():
            warnings[text] += len(numbers)
            places.setdefault(text, f"{block.file}:{numbers[0]}")
        ids = produced.outputs[handler.outputs[0]]
        lengths.add(ids.lengths)
        hashes.add(np.array([_hash(part) for part in _split(ids)], np.uint64))
        if labels := _labels(handler.outputs, produced):
            supervised.add(np.array([int((part != IGNORED).sum()) for part in _split(labels)]))
        answers.add(produced)
    if not totals.records:
        raise UsageError(f"--input {' '.join(args.input.input)}: it holds no records")
    _statistics(handler, totals, lengths.all(), supervised.all())
    answers.report()
    return _warn(args, totals, warnings, places, hashes=hashes.all())


class _GrowingArray:
    """An array that grows by parts."""

    def __init__(self, dtype: type = np.int64) -> None:
        self.parts: list[np.ndarray] = [np.zeros(0, dtype)]
        self.dtype = dtype

    def add(self, part: np.ndarray) -> None:
        self.parts.append(part.astype(self.dtype))

    def all(self) -> np.ndarray:
        return np.concatenate(self.parts)


def _split(tokens: Tokens) -> Iterator[np.ndarray]:
    start = 0
    for length in tokens.lengths.tolist():
        yield tokens.ids[start : start + length]
        start += length


def _hash(ids: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(ids).data, digest_size=8).digest(), "little")


def _labels(outputs: Sequence[str], produced: Produced) -> Tokens | None:
    return next((produced.outputs[name] for name in outputs if name.endswith("labels")), None)


def _show(blocks: Iterator[RecordBlock], handler: Handler, encoder: Encoder, count: int) -> None:
    """Print samples: what is given dim, what is learned green; between brackets where there are no colours."""
    pairs = [(i, i.replace("input_ids", "labels")) for i in handler.outputs if i.endswith("input_ids")]
    shown = 0
    for block in blocks:
        produced = produce(handler, handler.prepare(block), encoder)
        for bad in produced.summary.bad:
            log.warning(str(bad))
        columns = pairs or [(name, name) for name in handler.outputs]
        rows = [list(zip(*(_split(produced.outputs[name]) for name in both), strict=True)) for both in columns]
        for i in range(max(map(len, rows))):
            for (name, _), row in zip(columns, rows, strict=True):
                if i < len(row):
                    judged = produced.outputs.get(LABEL)
                    label = "" if judged is None else f", {'desirable' if judged.ids[i] else 'undesirable'}"
                    title = f"sample {shown + 1}, {name.removeprefix('packed_')}{label}"
                    show_sample(title, row[i][0], row[i][1], encoder.decode)
            shown += 1
            if shown == count:
                return


def show_sample(title: str, ids: np.ndarray, labels: np.ndarray, decode: Callable[[list[int]], str]) -> None:
    """Print a sample: what is given dim, what is learned green; between brackets where there are no colours."""
    colours = sys.stdout.isatty()
    learned = labels != IGNORED
    log.info(f"--- {title}: {len(ids)} tokens, {int(learned.sum())} learned")
    boundaries = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(ids)]
    text = ""
    for start, stop in itertools.pairwise(boundaries):
        part = printable(decode(ids[start:stop].tolist()), keep="\n\t")
        if colours:
            text += f"{_LEARNED if learned[start] else _GIVEN}{part}{_PLAIN}"
        else:
            text += f"[[{part}]]" if learned[start] else part
    if colours:
        print(text, flush=True)  # a log line would escape the colours
    else:
        log.info(text)


def _statistics(handler: Handler, totals: Totals, lengths: np.ndarray, supervised: np.ndarray) -> None:
    log.info(f"{totals}")
    if not len(lengths):
        return
    quantiles = ", ".join(f"{name} {np.quantile(lengths, q):.0f}" for name, q in (("median", 0.5), ("95 %", 0.95)))
    log.info(
        f"{handler.outputs[0]}: {len(lengths)} documents, {lengths.sum()} tokens; "
        f"shortest {lengths.min()}, {quantiles}, longest {lengths.max()}, mean {lengths.mean():.1f}"
    )
    if len(supervised):
        log.info(f"learned: {supervised.sum()} tokens, {100 * supervised.sum() / max(lengths.sum(), 1):.1f} %")
    exponents = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(exponents)
    for exponent in range(exponents.min(), exponents.max() + 1):
        bar = "#" * -(-_BAR * int(counts[exponent]) // int(counts.max()))
        log.info(f"  up to {2**exponent:>8} tokens {counts[exponent]:>9} {bar}")


def _warn(
    args: PreprocessArgs, totals: Totals, warnings: Counter[str], places: dict[str, str], *, hashes: np.ndarray
) -> int:
    """Print warnings, the most frequent first; the exit status."""
    for text, count in totals.counts.items():
        if count and (text in (TRUNCATED, DROPPED, UNSUPERVISED) or "not used" in text):
            warnings[text] += count
    if duplicates := len(hashes) - len(np.unique(hashes)):
        warnings["documents that are there already"] += duplicates
    if totals.bad:
        warnings["broken records"] += totals.bad
    for text, count in warnings.most_common():
        log.warning(f"{count} x {text}" + (f", first {places[text]}" if text in places else ""))
    log.info(f"{len(warnings)} warnings" if warnings else "no warnings")
    return 1 if warnings and args.check.strict else 0


def lint(conversation: Conversation | PreferencePair | Judged, thinking: bool | None) -> Iterator[str]:
    """Warnings about one conversation.

    Args:
        thinking: --enable-thinking.
    """
    if isinstance(conversation, Judged):
        conversation = conversation.conversation
    elif isinstance(conversation, PreferencePair):
        if conversation.chosen == conversation.rejected:
            yield "chosen and rejected are the same"
        conversation = conversation.prompt._replace(
            messages=(*conversation.prompt.messages, conversation.chosen, conversation.rejected)
        )
    for message in conversation.messages:
        if _CONTROL.search(message.content):
            yield "the text holds control tokens such as <|im_end|>, which would end the turn"
        if message.role == ASSISTANT:
            yield from _answer(message, thinking)
        elif not message.content.strip():
            yield f"the {message.role}'s message is empty"


def _answer(message: Message, thinking: bool | None) -> Iterator[str]:
    opened, closed = message.content.count(THINK), message.content.count(END_THINK)
    if opened > 1 or (opened and message.reasoning is not None):
        yield "an answer has thoughts twice"
    elif opened != closed:
        yield f"an answer has {THINK} without {END_THINK}, or the other way round"
    if _EMPTY_THOUGHT.search(message.content) or (message.reasoning is not None and not message.reasoning.strip()):
        yield f"an answer has empty thoughts, which are learned ({NO_THOUGHT.split()[0]} with nothing in it)"
    elif thinking and not message.has_thought():
        yield "an answer has no thoughts; with --enable-thinking true it learns empty ones"
    if thinking is False and message.has_thought():
        yield "an answer's thoughts are removed by --enable-thinking false"
    text = message.content.rpartition(END_THINK)[2].strip()
    if not text and not message.calls:
        yield "an answer is empty"
    elif len(text) >= _LONG and not message.calls and _OPEN_END.search(text):
        yield "an answer seems to be truncated (it is long and ends in the middle of a sentence)"
