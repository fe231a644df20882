"""Pairs of answers to one prompt: <prefix>_packed_{chosen,rejected}_{input_ids,labels}_document. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from qwen3_npu.data.train.rows import AnswerRows, Padding, Rows, instruction_rows
from qwen3_npu.data.train.sft_dataset import Sample
from qwen3_npu.data.train.token_file import open_indexed
from qwen3_npu.data.train.turns import IGNORED, kept_tokens, turns_of
from qwen3_npu.errors import UsageError

_NAMES = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, each with it."""

    chosen: Sample
    rejected: Sample


class PairFiles:
    """The four files of one prefix."""

    def __init__(self, prefix: str) -> None:
        """Raises: UsageError: a file is missing or damaged, or they do not belong together."""
        self.prefix = prefix
        self.files = [open_indexed(f"{prefix}_packed_{name}_document") for name in _NAMES]
        chosen, chosen_labels, rejected, rejected_labels = self.files
        for ids, labels in ((chosen, chosen_labels), (rejected, rejected_labels)):
            if not np.array_equal(ids.lengths, labels.lengths):
                raise UsageError(f"--data-path {prefix}: {labels.prefix} does not belong to {ids.prefix}")
        if len(chosen) != len(rejected):
            raise UsageError(f"--data-path {prefix}: {len(chosen)} chosen answers and {len(rejected)} rejected ones")

    def __len__(self) -> int:
        return len(self.files[0])

    def fingerprint(self) -> str:
        """What tells these data from others."""
        return " ".join(file.fingerprint() for file in self.files)

    def sample(self, number: int, longest: int) -> Pair:
        """A pair, each answer with its prompt cut to `longest` tokens as fine-tuning samples are."""
        chosen, chosen_labels, rejected, rejected_labels = (file[number] for file in self.files)
        return Pair(_cut(chosen, chosen_labels, longest), _cut(rejected, rejected_labels, longest))


def _cut(ids: np.ndarray, labels: np.ndarray, longest: int) -> Sample:
    if len(ids) > longest:
        where = kept_tokens(turns_of(labels), longest)
        ids, labels = ids[where], labels[where]
    return Sample(ids, labels, None)


def pair_rows(pairs: Sequence[Pair], padding: Padding, *, packed: bool) -> Rows:
    """The rows of a micro-batch of pairs.

    Args:
        packed: all sequences lie in one row, one after the other, apart as documents; padding follows the last.
    """
    samples = [sample for pair in pairs for sample in (pair.chosen, pair.rejected)]
    lengths = np.array([len(sample.ids) for sample in samples])
    if packed:
        segments = np.repeat(np.arange(1, len(samples) + 1), lengths)
        ids, labels = (np.concatenate([getattr(s, name) for s in samples]) for name in ("ids", "labels"))
        starts = np.cumsum(lengths) - lengths
        labels[starts] = IGNORED
        samples = [Sample(ids, labels, segments)]
    rows = instruction_rows(samples, padding, per_document=packed)
    places = np.arange(rows.tokens.shape[1])
    if packed:
        ends = np.cumsum(lengths)
        numbers = np.minimum(np.searchsorted(ends, places, side="right"), len(lengths) - 1)[None]
        # The label of a place is the token after it: the last place of a sequence has none.
        text = ((places < ends[-1]) & ~np.isin(places, ends - 1))[None]
    else:
        numbers = np.broadcast_to(np.arange(len(samples))[:, None], rows.tokens.shape)
        text = places < (lengths - 1)[:, None]
    # Prompts are not learned, but orpo wants to know how likely they are.
    following = np.zeros_like(rows.tokens)
    following[:, :-1] = rows.tokens[:, 1:]
    rows = dataclasses.replace(rows, labels=np.where(text, following, rows.labels))
    answers = AnswerRows(np.ascontiguousarray(numbers), text.astype(np.float32), len(lengths))
    return dataclasses.replace(rows, answers=answers)
