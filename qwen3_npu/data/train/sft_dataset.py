"""Fine-tuning samples: <prefix>_packed_{input_ids,attention_mask,labels}_document, alone or blended. No torch.

The order of samples depends on the seed and the files alone. It is computed and not stored, so it is never outdated.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from qwen3_npu.data.train.order import Blend, Epochs
from qwen3_npu.data.train.token_file import open_indexed
from qwen3_npu.data.train.token_record import IGNORED
from qwen3_npu.data.train.turns import kept_tokens, turns_of
from qwen3_npu.errors import UsageError

_NAMES = ("input_ids", "attention_mask", "labels")
_LOOKED_AT = 100


class Kind(enum.Enum):
    """The kind of a data set."""

    SINGLE = "one conversation per sample"
    PACK = "--pack"
    NEAT_PACK = "--pack --neat-pack"


@dataclasses.dataclass(frozen=True)
class TokenSample:
    """One sample.

    Attributes:
        ids, labels: int32 [s]; not shifted, -100 is not supervised.
        segments: int32 [s], the number of each token's document from 1, 0 for padding; None if there is one document.
    """

    ids: np.ndarray
    labels: np.ndarray
    segments: np.ndarray | None


class InstructionFiles:
    """The three files of one prefix."""

    def __init__(self, prefix: str) -> None:
        """Raises: UsageError: a file is missing or damaged, or they do not belong together."""
        self.prefix = prefix
        self.ids, self.mask, self.labels = (open_indexed(f"{prefix}_packed_{name}_document") for name in _NAMES)
        for other in (self.mask, self.labels):
            if not np.array_equal(other.lengths, self.ids.lengths):
                raise UsageError(f"--data-path {prefix}: {other.prefix} does not belong to {self.ids.prefix}")
        if not self.ids.lengths.min():
            raise UsageError(
                f"--data-path {prefix}: sample {int(self.ids.lengths.argmin())} of {self.ids.prefix} is empty"
            )
        self.kind = self._kind()

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """What tells these data from others."""
        return self.ids.fingerprint()

    def _kind(self) -> Kind:
        looked_at = range(min(len(self), _LOOKED_AT))
        # A pack ends with padding: numbered 0 by --neat-pack, and as long as every other pack.
        if any((self.mask[i] != 1).any() for i in looked_at):
            return Kind.NEAT_PACK
        same_length = self.ids.lengths.min() == self.ids.lengths.max()
        padded = all(self.labels[i][-1:] == -100 for i in looked_at)
        return Kind.PACK if same_length and padded else Kind.SINGLE

    def sample(self, number: int, longest: int) -> TokenSample:
        """A sample, truncated to `longest` tokens: packs at the end, conversations turn by turn."""
        ids, labels = self.ids[number], self.labels[number]
        segments = self.mask[number] if self.kind is Kind.NEAT_PACK else None
        if self.kind is Kind.PACK:  # its attention mask is 1 everywhere; padding is one token, never learned
            text = np.flatnonzero((ids != ids[-1]) | (labels != -100))
            segments = (np.arange(len(ids)) <= text[-1] if len(text) else np.zeros(len(ids))).astype(np.int32)
        if len(ids) > longest and self.kind is Kind.SINGLE:
            where = kept_tokens(turns_of(labels), longest)
            ids, labels = ids[where], labels[where]
        return TokenSample(ids[:longest], labels[:longest], None if segments is None else segments[:longest])

    def is_supervised(self, number: int, longest: int) -> bool:
        """Whether a sample has a token to learn: a label that an earlier token of its document predicts."""
        sample = self.sample(number, longest)
        learned = sample.labels[1:] != IGNORED
        if sample.segments is not None:
            learned &= sample.segments[1:] == sample.segments[:-1]
        return bool(learned.any())


Sample = TypeVar("Sample")
SampleOut = TypeVar("SampleOut", covariant=True)


class SampleFiles(Protocol[SampleOut]):
    """A data set of samples: conversations here, pairs of answers in `preference_dataset.py`."""

    prefix: str

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """What tells these data from others."""

    def sample(self, number: int, longest: int) -> SampleOut:
        """A sample, truncated to `longest` tokens."""


class InstructionDataset(Generic[Sample]):
    """An endless sequence of samples: each epoch has another order; several data sets are mixed in proportion."""

    def __init__(
        self,
        files: Sequence[SampleFiles[Sample]],
        weights: Sequence[float],
        shares: Sequence[range],
        *,
        longest: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        """
        Args:
            shares: the samples of each of `files` that belong to this split.
            longest: maximum number of tokens of a sample; longer ones are truncated.
        """
        used = [i for i, share in enumerate(shares) if len(share)]
        self.files, self.shares = [files[i] for i in used], [shares[i] for i in used]
        self.epochs = [
            Epochs(len(share), seed + i, shuffle=shuffle) for i, share in zip(used, self.shares, strict=True)
        ]
        self.blend = Blend([weights[i] for i in used])
        self.longest = longest

    def __len__(self) -> int:
        """Number of samples of all data sets; `__getitem__` accepts larger numbers, too."""
        return sum(map(len, self.shares))

    def locate(self, number: int) -> tuple[str, int]:
        """The place of sample `number`: the prefix and the index in it."""
        source, place = self.blend[number]
        return self.files[source].prefix, self.shares[source][self.epochs[source][place]]

    def __getitem__(self, number: int) -> Sample:
        source, place = self.blend[number]
        return self.files[source].sample(self.shares[source][self.epochs[source][place]], self.longest)


@dataclasses.dataclass(frozen=True)
class InstructionSplits(Generic[Sample]):
    """Samples for training, validation and test; None where there are none."""

    train: InstructionDataset[Sample] | None
    valid: InstructionDataset[Sample] | None
    test: InstructionDataset[Sample] | None


def open_instructions(prefixes: Sequence[str], *, per_document: bool) -> list[InstructionFiles]:
    """Open and check data sets.

    Args:
        per_document: attention must stay within the documents of packs (--reset-attention-mask).

    Raises:
        UsageError: see `InstructionFiles`; packs without boundaries.
    """
    files = [InstructionFiles(prefix) for prefix in prefixes]
    for one in files:
        if per_document and one.kind is Kind.PACK:
            raise UsageError(
                f"--reset-attention-mask: {one.prefix} was packed without document boundaries (--pack); preprocess it "
                f"again with --pack --neat-pack, or drop --reset-attention-mask"
            )
    return files


def instruction_splits(
    files: Sequence[SampleFiles[Sample]],
    weights: Sequence[float] | None,
    split: str,
    *,
    longest: int,
    seed: int,
    shuffle: bool = True,
) -> InstructionSplits[Sample]:
    """Data sets for training, validation and test.

    Args:
        weights: of the data sets; None: their sizes.
        split: shares of the samples of each, as in `--split 969,30,1`.

    Raises:
        UsageError: `split` is not three numbers.
    """
    weights = weights or [float(len(one)) for one in files]
    shares = [split_ranges(split, len(one)) for one in files]
    made = []
    for which in range(3):
        ranges = [share[which] for share in shares]
        made.append(
            InstructionDataset(files, weights, ranges, longest=longest, seed=seed, shuffle=shuffle and which == 0)
            if any(map(len, ranges))
            else None
        )
    return InstructionSplits(*made)


def split_ranges(split: str, count: int) -> list[range]:
    """`"98,2,0"`, 100 -> [range(0, 98), range(98, 100), range(100, 100)], rounded as Megatron does.

    Raises:
        UsageError: not up to three numbers, or none above 0.
    """
    try:
        parts = [float(part) for part in split.replace("/", ",").split(",")]
    except ValueError:
        parts = []
    if not parts or len(parts) > 3 or min(parts) < 0 or sum(parts) <= 0:
        raise UsageError(f"--split {split}: three shares are expected, such as 969,30,1")
    parts += [0.0] * (3 - len(parts))
    boundaries = [round(sum(parts[:i]) / sum(parts) * count) for i in range(4)]
    return [range(boundaries[i], boundaries[i + 1]) for i in range(3)]
