"""Records to documents in threads, in the order of the input, with progress and counts of omitted records."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from qwen3_npu import log
from qwen3_npu.args.preprocess import PreprocessArgs
from qwen3_npu.data.preprocess.handler import Handler, Prepared, Produced, produce
from qwen3_npu.data.preprocess.handlers import in_own_handler
from qwen3_npu.data.read.blocks import RecordBlock, first
from qwen3_npu.data.read.open import Inputs
from qwen3_npu.data.text.encoder import Encoder
from qwen3_npu.data.text.tokenizer import available_cpus
from qwen3_npu.errors import UsageError
from qwen3_npu.progress import Progress

_BAD_SHOWN = 20
_PREPARED = 16  # blocks that wait to be encoded
T = TypeVar("T")
R = TypeVar("R")


@dataclasses.dataclass
class Totals:
    """Sums over all blocks so far.

    Attributes:
        blocks, records: numbers that were read.
        bad: number of records that cannot be used.
        documents, tokens: numbers for each output.
        counts: event -> number of records.
    """

    blocks: int = 0
    records: int = 0
    bad: int = 0
    documents: Counter[str] = dataclasses.field(default_factory=Counter)
    tokens: Counter[str] = dataclasses.field(default_factory=Counter)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)

    def add(self, produced: Produced) -> None:
        """Count a block (its broken records are counted apart)."""
        self.blocks += 1
        self.records += produced.summary.records
        self.counts.update(produced.summary.counts)
        for name, tokens in produced.outputs.items():
            self.documents[name] += len(tokens.lengths)
            self.tokens[name] += len(tokens.ids)

    def __str__(self) -> str:
        parts = [f"{self.records} records", *(f"{n} {what}" for what, n in self.counts.items() if n)]
        if self.bad:
            parts.append(f"{self.bad} broken records left out")
        return ", ".join(parts)


def documents(
    args: PreprocessArgs, inputs: Inputs, handler: Handler, encoder: Future[Encoder], *, totals: Totals
) -> Iterator[tuple[RecordBlock, Produced]]:
    """Each block and its documents, after those that `totals` counts already; updates `totals`.

    One thread prepares blocks (Python runs one at a time anyway), even before the encoder is loaded. --workers threads
    encode.

    Raises:
        UsageError: an input is damaged, or more records are broken than --max-bad-records.
    """
    blocks = first(inputs.blocks(handler.columns), args.records.max_samples)
    counters = {"bytes": "B", "records": "records", "tokens": "tokens"}
    workers = args.output.workers or available_cpus()
    what = "check" if args.check.check else "preprocess"
    prepare = in_own_handler(args.records.handler_name, handler.prepare)
    make = in_own_handler(args.records.handler_name, produce)
    with (
        Progress(what, inputs.size or None, counters) as progress,
        ThreadPoolExecutor(1) as preparing,
        ThreadPoolExecutor(workers) as encoding,
        contextlib.closing(in_order(preparing, prepare, blocks, _PREPARED)) as prepared,
    ):
        for _ in range(totals.blocks):
            progress.counts["bytes"] += next(blocks).size
        waiting = dict.fromkeys(counters, 0)

        def encoded(item: tuple[RecordBlock, Prepared]) -> Produced:
            return make(handler, item[1], encoder.result())

        for (block, _), produced in in_order(encoding, encoded, prepared, 2 * workers):
            _count_bad(produced, totals, args.records.max_bad_records)
            totals.add(produced)
            yield block, produced
            for name, count in zip(waiting, (block.size, produced.summary.records, produced.tokens), strict=True):
                waiting[name] += count
            if waiting["records"] >= args.output.log_interval:
                progress.add(**waiting)
                waiting = dict.fromkeys(counters, 0)
        progress.add(**waiting)


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int
) -> Generator[tuple[T, R]]:
    """(item, function(item)) in the order of the items, with at most `ahead` more in progress."""
    waiting: collections.deque = collections.deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > ahead:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _count_bad(produced: Produced, totals: Totals, allowed: int) -> None:
    """Report broken records; stop when there are more than allowed."""
    for record in produced.summary.bad:
        totals.bad += 1
        if totals.bad > allowed:
            raise UsageError(f"{record} (broken records: {totals.bad}; --max-bad-records N leaves out up to N)")
        if totals.bad <= _BAD_SHOWN:
            log.warning(f"left out: {record}")
        elif totals.bad == _BAD_SHOWN + 1:
            log.warning("more records are left out; they are counted but not shown")
