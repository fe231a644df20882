"""Data sets of preference training. No torch.

Pairs of answers to one prompt: <prefix>_packed_{chosen,rejected}_{input_ids,labels}_document.
Labelled answers (kto): <prefix>_packed_answer_{input_ids,labels,desirable}_document; desirable holds 1 or 0 for each.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from qwen3_npu.data.train.rows import AnswerRows, Padding, Rows, instruction_rows
from qwen3_npu.data.train.sft_dataset import TokenSample
from qwen3_npu.data.train.token_file import open_indexed
from qwen3_npu.data.train.turns import IGNORED, kept_tokens, turns_of
from qwen3_npu.errors import UsageError

_NAMES = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")


@dataclasses.dataclass(frozen=True)
class SamplePair:
    """Two answers to one prompt; each sequence is prompt and answer."""

    chosen: TokenSample
    rejected: TokenSample


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

    def sample(self, number: int, longest: int) -> SamplePair:
        """A pair, each answer with its prompt truncated to `longest` tokens as fine-tuning samples are."""
        chosen, chosen_labels, rejected, rejected_labels = (file[number] for file in self.files)
        return SamplePair(_truncated(chosen, chosen_labels, longest), _truncated(rejected, rejected_labels, longest))


@dataclasses.dataclass(frozen=True)
class Labelled:
    """An answer with its prompt, and whether it is good."""

    answer: TokenSample
    desirable: bool


class LabelledFiles:
    """The files of one prefix.

    Attributes:
        files: ids and labels.
        desirable: bool [samples].
    """

    def __init__(self, prefix: str) -> None:
        """Raises: UsageError: a file is missing or damaged, or they do not belong together."""
        self.prefix = prefix
        names = ("input_ids", "labels", "desirable")
        ids, labels, desirable = (open_indexed(f"{prefix}_packed_answer_{name}_document") for name in names)
        if not np.array_equal(ids.lengths, labels.lengths):
            raise UsageError(f"--data-path {prefix}: {labels.prefix} does not belong to {ids.prefix}")
        if len(desirable) != len(ids) or (desirable.lengths != 1).any():
            raise UsageError(f"--data-path {prefix}: {desirable.prefix} does not hold one label for each of {len(ids)}")
        in_order = desirable.index.in_order
        found = np.array(desirable.tokens if in_order else [desirable[number][0] for number in range(len(desirable))])
        if ((found != 0) & (found != 1)).any():
            raise UsageError(f"--data-path {prefix}: {desirable.prefix} holds other labels than 0 and 1")
        self.files, self.desirable = [ids, labels], found == 1

    def __len__(self) -> int:
        return len(self.desirable)

    def fingerprint(self) -> str:
        """What tells these data from others."""
        digest = hashlib.sha256(self.desirable.tobytes()).hexdigest()[:16]
        return " ".join([*(file.fingerprint() for file in self.files), digest])

    def sample(self, number: int, longest: int) -> Labelled:
        """An answer, with its prompt truncated to `longest` tokens as fine-tuning samples are."""
        ids, labels = (file[number] for file in self.files)
        return Labelled(_truncated(ids, labels, longest), bool(self.desirable[number]))


def open_answers(stage: str, prefixes: Sequence[str]) -> list[PairFiles] | list[LabelledFiles]:
    """The data sets of a stage. Raises: UsageError: see `PairFiles` and `LabelledFiles`."""
    if stage == "kto":
        return [LabelledFiles(prefix) for prefix in prefixes]
    return [PairFiles(prefix) for prefix in prefixes]


def _truncated(ids: np.ndarray, labels: np.ndarray, longest: int) -> TokenSample:
    if len(ids) > longest:
        where = kept_tokens(turns_of(labels), longest)
        ids, labels = ids[where], labels[where]
    return TokenSample(ids, labels, None)


def pair_rows(pairs: Sequence[SamplePair], padding: Padding, *, packed: bool, scored: bool = False) -> Rows:
    """The rows of a micro-batch of pairs.

    Args:
        packed: all sequences lie in one row, as separate documents; padding follows the last one.
        scored: the loss is of the last token of each sequence, where the reward is computed (--stage rm).
    """
    samples = [sample for pair in pairs for sample in (pair.chosen, pair.rejected)]
    rows = _answer_rows(samples, padding, packed=packed)
    if not scored:
        return rows
    lengths = np.array([len(sample.ids) for sample in samples])
    ends = np.zeros_like(rows.loss_mask)
    if packed:
        ends[0, np.cumsum(lengths) - 1] = 1
    else:
        ends[np.arange(len(lengths)), lengths - 1] = 1
    return dataclasses.replace(rows, loss_mask=ends)


def labelled_rows(found: Sequence[Labelled], padding: Padding, *, longest: int, packed: bool) -> Rows:
    """The rows of a micro-batch of labelled answers. Each is followed by its prompt with the previous sample's answer.

    These mismatched rows estimate the divergence of the policy from the reference (KTO's z_0). TRL shifts the answers
    of a micro-batch in the same way.

    Args:
        longest: maximum number of tokens of a mismatched row.
        packed: as for `pair_rows`.
    """
    samples = []
    for one, before in zip(found, [found[-1], *found[:-1]], strict=True):
        samples += [one.answer, _mismatched(one.answer, before.answer, longest)]
    rows = _answer_rows(samples, padding, packed=packed)
    assert rows.answers is not None
    desirable = np.array([one.desirable for one in found], np.float32)
    return dataclasses.replace(rows, answers=dataclasses.replace(rows.answers, desirable=desirable))


def _mismatched(sample: TokenSample, other: TokenSample, longest: int) -> TokenSample:
    """The prompt of one sample with the answer of another."""
    prompt, start = _prompt_length(sample), _prompt_length(other)
    ids, labels = (
        np.concatenate((getattr(sample, name)[:prompt], getattr(other, name)[start:])) for name in ("ids", "labels")
    )
    return _truncated(ids, labels, longest)


def _prompt_length(sample: TokenSample) -> int:
    learned = np.flatnonzero(sample.labels != IGNORED)
    return int(learned[0]) if len(learned) else len(sample.labels)


def _answer_rows(samples: Sequence[TokenSample], padding: Padding, *, packed: bool) -> Rows:
    lengths = np.array([len(sample.ids) for sample in samples])
    if packed:
        segments = np.repeat(np.arange(1, len(samples) + 1), lengths)
        ids, labels = (np.concatenate([getattr(s, name) for s in samples]) for name in ("ids", "labels"))
        starts = np.cumsum(lengths) - lengths
        labels[starts] = IGNORED
        samples = [TokenSample(ids, labels, segments)]
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
