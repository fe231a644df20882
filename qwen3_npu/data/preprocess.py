"""`preprocess_data.py`: read, encode and write, all at once, in the order of the input."""

from __future__ import annotations

import collections
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from qwen3_npu import log
from qwen3_npu.args.preprocess import PreprocessArgs
from qwen3_npu.data.blocks import first
from qwen3_npu.data.encoder import open_encoder
from qwen3_npu.data.handlers import HANDLERS
from qwen3_npu.data.output import Output
from qwen3_npu.data.produced import Handler, Produced
from qwen3_npu.data.readers import Inputs, open_inputs
from qwen3_npu.data.tokenizer import TokenizerFolder, open_tokenizer
from qwen3_npu.errors import UsageError, choose
from qwen3_npu.progress import Progress, human

_BAD_SHOWN = 20
T = TypeVar("T")
R = TypeVar("R")


def preprocess(args: PreprocessArgs) -> int:
    """Do what the command line says; the exit status.

    Raises:
        UsageError: an input, the tokenizer or the output cannot be used, or records are broken.
    """
    make = choose(HANDLERS, args.input.handler_name or "(none)", "--handler-name")
    inputs = open_inputs(args.input.input, args.input.hf_datasets_params)
    if args.tokenizer.tokenizer_name_or_path is None:
        raise UsageError("--tokenizer-name-or-path is needed: the folder of a downloaded Qwen3 model")
    tokenizer = open_tokenizer(args.tokenizer.tokenizer_name_or_path)
    workers = args.output.workers or len(os.sched_getaffinity(0))
    encoder = open_encoder(tokenizer, args.tokenizer.tokenizer_backend, workers)
    handler = make(args, tokenizer, encoder)
    log.info(f"input: {_described(inputs)}; tokens by {encoder.name}, {workers} workers")
    output = Output(
        args.output.output_prefix, handler.outputs, _identity(args, inputs, tokenizer), resume=args.output.resume
    )
    try:
        _write(args, inputs, handler, output, workers)
        if not output.totals.records:
            raise UsageError(f"--input {' '.join(args.input.input)}: it holds no records")
        if not any(output.totals.documents.values()):
            raise UsageError(f"--input {' '.join(args.input.input)}: no record gave a document{_counted(output)}")
        output.publish()
    except OSError as error:
        output.abandon()
        raise UsageError(f"--output-prefix {args.output.output_prefix}: cannot be written: {error}") from None
    except (UsageError, KeyboardInterrupt):
        if output.abandon():
            log.info("what is finished is kept: --resume goes on from there")
        raise
    _report(output)
    return 0


def _write(args: PreprocessArgs, inputs: Inputs, handler: Handler, output: Output, workers: int) -> None:
    totals = output.totals
    blocks = first(inputs.blocks(handler.columns), args.input.max_samples)
    counters = {"bytes": "B", "records": " records", "tokens": " tokens"}
    with Progress("preprocess", inputs.size, counters) as progress, ThreadPoolExecutor(workers) as pool:
        waiting = {"bytes": 0, "records": 0, "tokens": 0}
        for done in range(totals.blocks):
            block = next(blocks, None)
            if block is None:
                raise AssertionError(f"block {done} is gone though the inputs are the same")
            progress.counts["bytes"] += block.size
        for block, produced in _in_order(pool, handler, blocks, 2 * workers):
            _count_bad(args, produced, output)
            output.add(produced.outputs)
            totals.blocks += 1
            totals.records += produced.records
            totals.counts.update(produced.counts)
            output.finish_part()
            waiting["bytes"] += block.size
            waiting["records"] += produced.records
            waiting["tokens"] += produced.tokens
            if waiting["records"] >= args.output.log_interval:
                progress.add(**waiting)
                waiting = dict.fromkeys(waiting, 0)
        progress.add(**waiting)


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int
) -> Iterator[tuple[T, R]]:
    """(item, function(item)) in the order of the items, with at most `ahead` of them under way."""
    waiting: collections.deque = collections.deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > ahead:
                item, future = waiting.popleft()
                yield item, future.result()
        while waiting:
            item, future = waiting.popleft()
            yield item, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _count_bad(args: PreprocessArgs, produced: Produced, output: Output) -> None:
    """Report broken records; stop when there are more than allowed."""
    for record in produced.bad:
        output.totals.bad += 1
        if output.totals.bad > args.input.max_bad_records:
            hint = f"{output.totals.bad} broken records; --max-bad-records N leaves out up to N"
            raise UsageError(f"{record} ({hint})")
        if output.totals.bad <= _BAD_SHOWN:
            log.warning(f"left out: {record}")
        elif output.totals.bad == _BAD_SHOWN + 1:
            log.warning("left out: more, which are counted but not shown")


def _identity(args: PreprocessArgs, inputs: Inputs, tokenizer: TokenizerFolder) -> str:
    """Changes with whatever changes the output."""
    irrelevant = {"input", "max_bad_records", "tokenizer_backend", "workers", "log_interval", "resume"}
    flags = {k: v for group in args for k, v in vars(group).items() if k not in irrelevant}
    everything: list[Any] = [inputs.identity(), tokenizer.identity, sorted(flags.items())]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()


def _described(inputs: Inputs) -> str:
    if inputs.dataset:
        return f"dataset {inputs.dataset}"
    kinds = collections.Counter(file.format for file in inputs.files)
    return f"{', '.join(f'{n} {kind}' for kind, n in kinds.items())}, {human(inputs.size, 'B')}"


def _counted(output: Output) -> str:
    totals = output.totals
    parts = [f"{n} {what}" for what, n in totals.counts.items() if n]
    if totals.bad:
        parts.append(f"{totals.bad} broken records left out")
    return "; " + ", ".join(parts) if parts else ""


def _report(output: Output) -> None:
    totals = output.totals
    log.info(f"{totals.records} records{_counted(output)}")
    for name, prefix in output.prefixes.items():
        log.info(f"written: {prefix}.bin .idx: {totals.documents[name]} documents, {totals.tokens[name]} tokens")
