"""Samples to the rows of a micro-batch: shifted labels, padding, positions, document boundaries. No torch.

Boundaries of documents in a sequence are (0, ..., s): document k is [boundaries[k], boundaries[k + 1]).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from qwen3_npu.data.train.sft_dataset import TokenSample
from qwen3_npu.data.train.token_file import Indexed
from qwen3_npu.data.train.token_record import IGNORED
from qwen3_npu.errors import UsageError

_LOOKED_AT = 1000


@dataclasses.dataclass(frozen=True)
class AnswerRows:
    """The answer to which each position of a micro-batch belongs.

    Attributes:
        numbers: int64 [b, s]. A chosen answer has an even number n, the rejected one of the pair n + 1. For kto a
            labelled answer has an even number n, its prompt with another sample's answer n + 1.
        text_mask: float32 [b, s]: 1 where the label belongs to prompt or answer.
        count: answers.
        desirable: kto: float32 [count / 2], 1 for a good answer.
    """

    numbers: np.ndarray
    text_mask: np.ndarray
    count: int
    desirable: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Rows:
    """One micro-batch.

    Attributes:
        tokens, labels: int64 [b, s]; labels[i] follows tokens[i] (0 where it is not supervised).
        loss_mask: float32 [b, s]; 1 where the label is supervised.
        positions: int64 [b, s].
        cu_seqlens: boundaries of documents, (0, ..., s); the rows are then concatenated and b is 1. None if each row
            is one document.
        real_tokens: tokens without padding.
        squares: sum of the squared lengths of the documents, to which the FLOP of attention are proportional.
        padding: bool [b, s], true where a token is padding; None if there is no padding.
        answers: of preference training.
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    positions: np.ndarray
    cu_seqlens: tuple[int, ...] | None
    real_tokens: int
    squares: int
    padding: np.ndarray | None = None
    answers: AnswerRows | None = None


@dataclasses.dataclass(frozen=True)
class Padding:
    """The length of rows.

    Attributes:
        token: the padding token.
        length: length of every row; None: length of the longest sample of the micro-batch.
        multiple: the length is rounded up to a multiple of this number.
    """

    token: int
    length: int | None
    multiple: int = 1

    def of(self, samples: Sequence[TokenSample]) -> int:
        """The length of the rows of these samples."""
        length = self.length or max(len(sample.ids) for sample in samples)
        return -(-length // self.multiple) * self.multiple


def padding_multiple(pad_to_multiple_of: int, *, tensor: int, context: int) -> int:
    """Lengths must be multiples of this number, for --pad-to-multiple-of, sequence parallelism over `tensor` ranks, and
    two chunks of the sequence on each of `context` ranks."""
    return math.lcm(pad_to_multiple_of, tensor * (2 * context if context > 1 else 1))


def instruction_rows(
    samples: Sequence[TokenSample], padding: Padding, *, per_document: bool, reset_positions: bool = True
) -> Rows:
    """Fine-tuning samples as rows.

    Args:
        per_document: attention stays within the documents of a pack; a sample that is no pack is one document.
        reset_positions: positions restart in each document (--reset-position-ids); else in each row only.
    """
    size = padding.of(samples)
    shape = len(samples), size
    tokens, labels = np.full(shape, padding.token, np.int64), np.full(shape, IGNORED, np.int64)
    segments = np.zeros(shape, np.int64)
    for row, sample in enumerate(samples):
        count = len(sample.ids)
        tokens[row, :count] = sample.ids
        # The label of a place is the token after it, so a sample's last place has none.
        labels[row, : count - 1] = sample.labels[1:]
        segments[row, :count] = 1 if sample.segments is None else sample.segments
    # The last token of a document does not predict the first one of the next.
    labels[:, :-1][segments[:, :-1] != segments[:, 1:]] = IGNORED
    mask = labels != IGNORED
    return _rows(
        tokens,
        np.where(mask, labels, 0),
        mask.astype(np.float32),
        [segment_boundaries(row) for row in segments],
        per_document=per_document,
        reset_positions=reset_positions and per_document,
        padding=segments == 0,
    )


def pretraining_rows(
    tokens: np.ndarray,
    labels: np.ndarray,
    loss_mask: np.ndarray,
    *,
    eod: int,
    reset_position_ids: bool,
    reset_attention_mask: bool,
    eod_mask_loss: bool,
) -> Rows:
    """Rows of pretraining text, whose documents end with `eod`, treated as Megatron does.

    Args:
        tokens, labels, loss_mask: [b, s]; labels are shifted already.
        eod_mask_loss: the token after an eod is not predicted.
    """
    mask = loss_mask.astype(np.float32)
    if eod_mask_loss:
        mask = np.where(tokens == eod, np.float32(0), mask)
    boundaries = [boundaries_at_eod(row, eod) for row in tokens]
    return _rows(
        tokens,
        labels,
        mask,
        boundaries,
        per_document=reset_attention_mask,
        reset_positions=reset_position_ids,
        padding=np.zeros(tokens.shape, bool),
    )


def _rows(
    tokens: np.ndarray,
    labels: np.ndarray,
    mask: np.ndarray,
    boundaries: Sequence[Sequence[int]],
    *,
    per_document: bool,
    reset_positions: bool,
    padding: np.ndarray,
) -> Rows:
    size = tokens.shape[1]
    real = size - padding.sum(1)
    places = np.stack([positions(row if reset_positions else [0, size]) for row in boundaries])
    known = padding if padding.any() else None
    if not per_document:
        return Rows(
            tokens,
            labels,
            mask,
            places,
            cu_seqlens=None,
            real_tokens=int(real.sum()),
            squares=int((real**2).sum()),
            padding=known,
        )
    ends = [np.minimum(row, count) for row, count in zip(boundaries, real, strict=True)]
    squares = sum(int((np.diff(row) ** 2).sum()) for row in ends)
    tokens, labels, mask, places = (array.reshape(1, -1) for array in (tokens, labels, mask, places))
    known = None if known is None else known.reshape(1, -1)
    return Rows(
        tokens,
        labels,
        mask,
        places,
        cu_seqlens=joined_boundaries(boundaries),
        real_tokens=int(real.sum()),
        squares=squares,
        padding=known,
    )


def boundaries_at_eod(tokens: np.ndarray, eod: int) -> list[int]:
    """Boundaries of documents that end with `eod` (`--reset-attention-mask` in pretraining, as in Megatron)."""
    ends = (np.flatnonzero(tokens == eod) + 1).tolist()
    return [0, *ends] if ends and ends[-1] == len(tokens) else [0, *ends, len(tokens)]


def segment_boundaries(segments: np.ndarray) -> list[int]:
    """Boundaries from the document number of each token (--neat-pack); padding, 0, is one document."""
    return [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), len(segments)]


def joined_boundaries(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Boundaries of concatenated rows."""
    found, offset = [0], 0
    for boundaries in rows:
        found += [offset + end for end in boundaries[1:]]
        offset += boundaries[-1]
    return tuple(found)


def positions(boundaries: Sequence[int]) -> np.ndarray:
    """The position of each token in its document, int64 [s]."""
    starts, sizes = np.array(boundaries[:-1]), np.diff(boundaries)
    return np.arange(boundaries[-1]) - np.repeat(starts, sizes)


def find_eod(data: Indexed, flag: str) -> int:
    """The token that ends every document.

    Args:
        flag: the flag that needs it, for the message.

    Raises:
        UsageError: documents do not end with one and the same token.
    """
    looked_at = range(min(len(data), _LOOKED_AT))
    last = {int(data[i][-1]) if len(data[i]) else None for i in looked_at}
    if len(last) != 1 or None in last:
        raise UsageError(
            f"{flag}: the documents of {data.prefix} do not end with an end-of-document token; "
            f"preprocess them with --append-eod"
        )
    return int(last.pop() or 0)


@dataclasses.dataclass(frozen=True)
class ThinkTokens:
    """The tokenizer's numbers of `<think>` and `</think>`."""

    open: int
    close: int

    def mask(self, tokens: np.ndarray, boundaries: Sequence[int] | None) -> np.ndarray:
        """float32 [b, s]: 1 where the token after this one (the label) belongs to a thought, its marks included.

        Args:
            boundaries: of documents in a single row, (0, ..., s); None if each row is one document.
        """
        inside = np.zeros(tokens.shape, bool)
        for start, end in itertools.pairwise(boundaries or (0, tokens.shape[1])):
            part = tokens[:, start:end]
            closed = part == self.close
            depth = np.cumsum(part == self.open, axis=1) - np.cumsum(closed, axis=1)
            inside[:, start:end] = (depth > 0) | closed
        return np.pad(inside[:, 1:], ((0, 0), (0, 1))).astype(np.float32)
