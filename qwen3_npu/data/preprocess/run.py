"""`preprocess_data.py`: read, encode and write concurrently, in the order of the input."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from qwen3_npu import log
from qwen3_npu.args.preprocess import TEXT_HANDLER, PreprocessArgs
from qwen3_npu.data.preprocess.check import check
from qwen3_npu.data.preprocess.handler import Handler
from qwen3_npu.data.preprocess.handlers import maker, own_source
from qwen3_npu.data.preprocess.output import DatasetOutput, merge_datasets
from qwen3_npu.data.preprocess.packing import PackRule, pack
from qwen3_npu.data.preprocess.pipeline import Totals, documents
from qwen3_npu.data.preprocess.sft_handler import THOUGHTS
from qwen3_npu.data.read.open import Inputs, open_inputs
from qwen3_npu.data.text.encoder import Encoder, open_encoder
from qwen3_npu.data.text.prompt_types import resolved
from qwen3_npu.data.text.tokenizer import Loading, TokenizerFolder, available_cpus, open_tokenizer, start_loading
from qwen3_npu.data.train.token_file import IndexedWriter
from qwen3_npu.errors import UsageError
from qwen3_npu.lease import Lease
from qwen3_npu.progress import human

# Flags that do not change what is written.
_WITHOUT_EFFECT = {
    "input",
    "max_bad_records",
    "tokenizer_backend",
    "workers",
    "log_interval",
    "resume",
    "output_prefix",
}


def preprocess(args: PreprocessArgs, loading: Loading | None = None) -> int:
    """Run the preprocessing that the command line describes. Returns the exit status.

    Args:
        loading: the tokenizer, if loading has started already.

    Raises:
        UsageError: an input, the tokenizer or the output cannot be used, or records are broken.
    """
    args.instruction.check_packing()
    looks_only = args.check.check or args.check.show > 0
    prefix = args.output.output_prefix
    if prefix is None and not looks_only:
        raise UsageError("--output-prefix is needed: the start of the output's names")
    if args.output.merge_group_keys:
        with _lease(str(prefix)):
            merge_datasets(args.input.input, args.output.merge_group_keys, str(prefix))
        return 0
    if args.records.handler_name is None:
        log.info(f"--handler-name {TEXT_HANDLER} (the default): records are text")
        args = args._replace(records=dataclasses.replace(args.records, handler_name=TEXT_HANDLER))
    make = maker(str(args.records.handler_name))
    inputs = open_inputs(args.input.input, args.records.hf_datasets_params)
    chosen = args.tokenizer
    if chosen.tokenizer_name_or_path is None:
        raise UsageError("--tokenizer-name-or-path is needed: the folder of a downloaded Qwen3 model")
    loading = loading or start_loading(chosen.tokenizer_name_or_path, chosen.tokenizer_backend, args.output.workers)
    tokenizer = open_tokenizer(chosen.tokenizer_name_or_path)
    handler = make(args, tokenizer)
    with ThreadPoolExecutor(1) as pool:
        encoder = pool.submit(_opened, args, inputs, loading)
        if looks_only:
            return check(args, inputs, handler, encoder)
        with _lease(str(prefix)):
            _write(args, inputs, handler, encoder, tokenizer=tokenizer)
    return 0


def _lease(prefix: str) -> Lease:
    """A lease of the output, since two runs would mix their files."""
    return Lease(Path(f"{prefix}.lease"), f"--output-prefix {prefix}", "give another --output-prefix")


def _opened(args: PreprocessArgs, inputs: Inputs, loading: Loading) -> Encoder:
    encoder = open_encoder(loading, forced=args.tokenizer.tokenizer_backend != "auto")
    workers = args.output.workers or available_cpus()
    log.info(f"input: {_described(inputs)}; tokens by {encoder.name}, {workers} workers")
    return encoder


def _write(
    args: PreprocessArgs, inputs: Inputs, handler: Handler, encoder: Future[Encoder], *, tokenizer: TokenizerFolder
) -> None:
    prefix, packs = str(args.output.output_prefix), args.instruction.pack
    # Packing needs all samples first; attention_mask is made of them.
    names = [n for n in handler.outputs if not (packs and n.endswith("attention_mask"))]
    identity = _identity(args, inputs, tokenizer)
    output = DatasetOutput(prefix + "_unpacked" if packs else prefix, names, identity, resume=args.output.resume)
    try:
        for _, produced in documents(args, inputs, handler, encoder, totals=output.totals):
            output.add(produced.outputs)
            output.finish_part()
        if not any(output.totals.documents.values()):
            raise UsageError(f"--input {' '.join(args.input.input)}: nothing to write; {output.totals}")
        if packs:
            _pack(args, tokenizer, output, handler.outputs)
        else:
            output.publish(_made(args, tokenizer, output.totals))
            _report(output)
    except (OSError, UsageError, KeyboardInterrupt) as error:
        if output.resumable():
            log.info("finished parts are kept: --resume continues from there")
        else:
            output.remove()
        if isinstance(error, OSError):
            raise UsageError(f"--output-prefix {prefix}: cannot be written: {error.strerror or error}") from None
        raise


def _pack(args: PreprocessArgs, tokenizer: TokenizerFolder, output: DatasetOutput, names: Sequence[str]) -> None:
    chosen, prefix = args.instruction, args.output.output_prefix
    rule = PackRule(chosen.seq_length or 0, tokenizer.pad(), chosen.neat_pack, chosen.n_subs)
    prefixes = [f"{prefix}_{name}_document" for name in names]
    writers = [IndexedWriter(p, made=_made(args, tokenizer, output.totals)) for p in prefixes]
    try:
        packs = pack(list(output.writers.values()), writers, rule)
    except BaseException:
        for writer in writers:
            writer.abort()
        raise
    output.remove()
    samples, tokens = (next(iter(counter.values())) for counter in (output.totals.documents, output.totals.tokens))
    log.info(f"{output.totals}")
    filled = 100 * tokens / (packs * rule.length)
    log.info(f"{samples} samples in {packs} packs of {rule.length} tokens, {filled:.1f} % of them filled")
    for p in prefixes:
        log.info(f"written: {p}.bin .idx")


def _made(args: PreprocessArgs, tokenizer: TokenizerFolder, totals: Totals) -> dict[str, object]:
    """The settings that determine the tokens, for the record that a training reads (`TokenRecord.made`)."""
    made: dict[str, object] = {"tokenizer": tokenizer.identity}
    if args.instruction.prompt_type is not None:
        made["prompt_type"] = resolved(args.instruction.prompt_type, tokenizer)
        thinking = args.instruction.enable_thinking.lower()
        if made["prompt_type"] == "hf" and thinking == "none" and not totals.counts[THOUGHTS]:
            thinking = "false"  # the template wrote empty thoughts: a prompt has them with enable_thinking=False only
        made["enable_thinking"] = thinking
    return made


def _report(output: DatasetOutput) -> None:
    totals = output.totals
    log.info(f"{totals}")
    for name, prefix in output.prefixes.items():
        log.info(f"written: {prefix}.bin .idx: {totals.documents[name]} documents, {totals.tokens[name]} tokens")


def identifying_flags(args: PreprocessArgs) -> list[tuple[str, object]]:
    """The flags that change what is written."""
    flags = sorted((k, v) for group in args for k, v in vars(group).items() if k not in _WITHOUT_EFFECT)
    own = own_source(args.records.handler_name)
    return [*flags, ("handler", own)] if own else flags


def _identity(args: PreprocessArgs, inputs: Inputs, tokenizer: TokenizerFolder) -> str:
    """A digest of everything that determines the output."""
    everything: list[object] = [inputs.identity(), tokenizer.identity, identifying_flags(args)]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()


def _described(inputs: Inputs) -> str:
    if inputs.dataset:
        return f"dataset {inputs.dataset}"
    kinds = collections.Counter(file.format for file in inputs.files)
    return f"{', '.join(f'{n} {kind}' for kind, n in kinds.items())}, {human(inputs.size, 'B')}"
