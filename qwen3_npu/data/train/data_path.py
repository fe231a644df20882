"""Check --data-path before torch is imported."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwen3_npu import log
from qwen3_npu.args.training import DATA_KINDS, DataArgs
from qwen3_npu.data.text.tokenizer import TokenizerFolder, open_tokenizer
from qwen3_npu.data.train.preference_dataset import open_answers
from qwen3_npu.data.train.sft_dataset import InstructionFiles, open_instructions, split_ranges
from qwen3_npu.data.train.token_file import Indexed, open_indexed
from qwen3_npu.data.train.token_record import TokenRecord, check_ids, scanned_record
from qwen3_npu.errors import UsageError, did_you_mean


def blend(data_path: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """`["0.3", "a", "0.7", "b"]` -> (["a", "b"], [0.3, 0.7]); `["a"]` -> (["a"], None).

    Raises:
        UsageError: weights and prefixes do not alternate.
    """

    def number(text: str) -> float | None:
        try:
            return float(text)
        except ValueError:
            return None

    weights = [number(text) for text in data_path[::2]]
    if len(data_path) > 1 and len(data_path) % 2 == 0 and None not in weights:
        if not all(w is not None and 0 < w < math.inf for w in weights):
            raise UsageError(f"--data-path {' '.join(data_path)}: weights must be above 0")
        return list(data_path[1::2]), [w for w in weights if w is not None]
    if any(number(text) is not None and not Path(text + ".idx").exists() for text in data_path):
        raise UsageError(f"--data-path {' '.join(data_path)}: give WEIGHT PREFIX pairs, or prefixes without any weight")
    return list(data_path), None


def cache_folder(data: DataArgs) -> Path:
    """The folder of index caches and other files derived from --data-path."""
    return Path(data.data_cache_path or Path(blend(data.data_path)[0][0]).parent / "cache")


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """Facts about the training's samples, known before the start.

    Attributes:
        samples: number of training samples in one epoch, over all data sets.
        truncated: of these, the samples that are longer than --seq-length.
        truncated_tokens: tokens of these samples beyond that length.
    """

    samples: int
    truncated: int = 0
    truncated_tokens: int = 0


def check_data(
    data: DataArgs, vocab_size: int, *, seq_length: int, scans: bool = True, evaluates: bool = False
) -> DataFacts:
    """Open every file of --data-path as training will, and check its ids.

    Args:
        vocab_size: of the model.
        scans: read through files that have no record of their ids; true on one process of a job.
        evaluates: the share for validation is needed, too.

    Raises:
        UsageError: a share that is needed is empty, or nothing can be learned; see `blend`, `open_indexed`,
            `open_instructions` and `check_ids`.
    """
    prefixes, _ = blend(data.data_path)
    for prefix in prefixes:
        _check_there(prefix, data)
    if not data.is_preference:
        _check_split(data, prefixes, evaluates=evaluates)
    tokenizer = open_tokenizer(data.tokenizer_name_or_path) if scans and data.tokenizer_name_or_path else None
    if tokenizer is not None:
        _compare_vocabularies(tokenizer, vocab_size)
    if data.is_preference:
        return _answer_facts(data, prefixes, vocab_size, tokenizer, seq_length=seq_length, scans=scans)
    if data.is_instruction:
        files = open_instructions(prefixes, per_document=data.per_document)
        if scans:
            for one in files:
                for part in (one.ids, one.labels, one.mask):
                    limit = vocab_size if part is not one.mask else sys.maxsize
                    record = _check_ids(part, data, limit, labels=part is one.labels)
                _compare_tokenizers(one.prefix, record, tokenizer)
            _check_supervised(files, data.split, seq_length)
        return _facts([((one.ids,), len(one)) for one in files], data.split, seq_length)
    texts = [open_indexed(prefix) for prefix in prefixes]
    if scans:
        for text in texts:
            _compare_tokenizers(text.prefix, _check_ids(text, data, vocab_size), tokenizer)
    return DataFacts(sum(_text_samples(text, data.split, seq_length) for text in texts))


def _answer_facts(
    data: DataArgs,
    prefixes: Sequence[str],
    vocab_size: int,
    tokenizer: TokenizerFolder | None,
    *,
    seq_length: int,
    scans: bool,
) -> DataFacts:
    opened = open_answers(data.stage, prefixes)
    if scans:
        for one in opened:
            for number, part in enumerate(one.files):
                record = _check_ids(part, data, vocab_size, labels=number % 2 == 1)
                if record.ids.smallest is None:
                    raise UsageError(f"--data-path {part.prefix} holds no token to learn; preprocess it again")
            _compare_tokenizers(one.prefix, record, tokenizer)
    return _facts([(one.files[::2], len(one)) for one in opened], data.split, seq_length)


# Content -> the ending of the first file of a prefix.
DATA_SUFFIXES = {
    "text": "",
    "instruction data": "_packed_input_ids_document",
    "pairs": "_packed_chosen_input_ids_document",
    "labelled answers": "_packed_answer_input_ids_document",
}


def _check_there(prefix: str, data: DataArgs) -> None:
    """Raises: UsageError: a word of --data-path names no data, or data of another stage."""
    wanted = data.kind
    end = DATA_SUFFIXES[wanted]
    if any(Path(f"{prefix}{end}{suffix}").exists() for suffix in (".idx", ".bin")):
        return
    for kind, other in DATA_SUFFIXES.items():
        if Path(f"{prefix}{other}.idx").exists():
            raise UsageError(
                f"--data-path {prefix} holds {kind}, and this training reads {wanted}: give {DATA_KINDS[kind]}"
            )
    folder = Path(prefix).parent
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    pairs = [name.removesuffix(f"{end}.idx") for name in names if name.endswith(f"{end}.idx")]
    hint = did_you_mean(Path(prefix).name, [*pairs, *(name for name in names if not name.endswith((".idx", ".bin")))])
    if not hint and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", prefix):
        hint = "; for a data set of the Hugging Face Hub give --handler-name, which says what its records are"
    raise UsageError(
        f"--data-path {prefix}: not found: there is no pair {prefix}{end}.idx and .bin, and no raw file or folder of "
        f"this name{hint}"
    )


def _check_split(data: DataArgs, prefixes: Sequence[str], *, evaluates: bool) -> None:
    pool = data.is_instruction  # text is drawn from every file
    end, what = (DATA_SUFFIXES["instruction data"], "sample") if pool else ("", "document")
    counts = [len(open_indexed(prefix + end)) for prefix in prefixes]
    shares = [split_ranges(data.split, count) for count in counts]
    for name, which, advice in (("training", 0, ""), ("validation", 1, " or --eval-iters 0"))[: 1 + evaluates]:
        empty = [prefix for prefix, share in zip(prefixes, shares, strict=True) if not share[which]]
        if empty and (not pool or len(empty) == len(prefixes)):
            held = f"{empty[0]} ({counts[prefixes.index(empty[0])]})"
            raise UsageError(
                f"--split {data.split} leaves no {what} of {held} for {name}; give another --split{advice}"
            )


def _check_ids(pair: Indexed, data: DataArgs, limit: int, *, labels: bool = False) -> TokenRecord:
    record = scanned_record(pair.prefix, pair.tokens, cache_folder(data))
    check_ids(pair.prefix, record.ids, limit, labels=labels)
    return record


def _compare_vocabularies(tokenizer: TokenizerFolder, vocab_size: int) -> None:
    if tokenizer.largest_id >= vocab_size:
        log.warning_once(
            f"--tokenizer-name-or-path {tokenizer.path} has tokens up to {tokenizer.largest_id}, but the model's "
            f"vocabulary has {vocab_size} rows: is it the model's tokenizer?"
        )


def _compare_tokenizers(prefix: str, record: TokenRecord, tokenizer: TokenizerFolder | None) -> None:
    made_with = record.made.get("tokenizer")
    if tokenizer is not None and made_with not in (None, tokenizer.identity):
        log.warning_once(
            f"--data-path {prefix} was made with another tokenizer than --tokenizer-name-or-path {tokenizer.path}; "
            f"preprocess it again, unless the two give the same tokens"
        )


def _check_supervised(files: Sequence[InstructionFiles], split: str, seq_length: int) -> None:
    """Raises: UsageError: no token of the training's samples is learned."""
    for one in files:
        if any(one.is_supervised(number, seq_length) for number in split_ranges(split, len(one))[0]):
            return
    names = " ".join(one.prefix for one in files)
    raise UsageError(
        f"--data-path {names}: no sample for training has a token to learn in its first {seq_length} tokens; "
        f"check the labels (preprocess_data.py --show), or raise --seq-length"
    )


def _facts(data_sets: Sequence[tuple[Sequence[Indexed], int]], split: str, seq_length: int) -> DataFacts:
    """The facts about data sets. Each data set is given by its files of ids and its samples."""
    samples = truncated = truncated_tokens = 0
    for ids, count in data_sets:
        share = split_ranges(split, count)[0]
        lengths = np.stack([one.lengths[share.start : share.stop] for one in ids])
        over = (lengths.astype(np.int64) - seq_length).clip(0).sum(axis=0)
        samples += len(share)
        truncated += int((over > 0).sum())
        truncated_tokens += int(over.sum())
    return DataFacts(samples, truncated, truncated_tokens)


def _text_samples(text: Indexed, split: str, seq_length: int) -> int:
    """Number of samples in an epoch of the training documents."""
    share = split_ranges(split, len(text))[0]
    return max(int(text.lengths[share.start : share.stop].sum(dtype=np.int64)) - 1, 0) // seq_length
