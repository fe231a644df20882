"""What becomes of a block of records."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from qwen3_npu.data.blocks import BadRecord, Block
from qwen3_npu.data.encoder import Tokens


@dataclasses.dataclass(frozen=True)
class Produced:
    """Documents made of a block.

    Attributes:
        outputs: name of an output (`text`, `packed_labels`, ..) -> its documents.
        records: how many records were read.
        counts: what else happened, e.g. "empty text" -> 3.
        bad: records that cannot be used.
        warnings: what --check finds -> the records.
    """

    outputs: Mapping[str, Tokens]
    records: int
    counts: Counter[str]
    bad: Sequence[BadRecord]
    warnings: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of the first output."""
        return len(next(iter(self.outputs.values())).ids)


class Handler(Protocol):
    """Makes documents of records. Safe to call in several threads.

    Attributes:
        outputs: the names of the outputs; each is a file <prefix>_<name>_document.
        columns: the columns of a record that it reads.
    """

    outputs: Sequence[str]
    columns: Sequence[str]

    def __call__(self, block: Block) -> Produced:
        """The documents of a block."""
