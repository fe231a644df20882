"""How a block of records becomes documents: strings, then tokens, then documents."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qwen3_npu.data.read.blocks import BadRecord, RecordBlock
from qwen3_npu.data.text.encoder import Encoder, Tokens


@dataclasses.dataclass(frozen=True)
class BlockSummary:
    """Counts and warnings about the records of a block.

    Attributes:
        records: number of records that were read.
        counts: event -> number, e.g. "empty text" -> 3.
        bad: records that cannot be used, in order.
        warnings: warning of --check -> its records.
    """

    records: int
    counts: Counter[str]
    bad: Sequence[BadRecord]
    warnings: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The records of a block as strings.

    Attributes:
        texts: the strings to be encoded.
        layout: data that the handler needs to make documents of the tokens.
    """

    texts: Sequence[str]
    layout: Any
    summary: BlockSummary


@dataclasses.dataclass(frozen=True)
class Produced:
    """The documents of a block.

    Attributes:
        outputs: name of an output (`text`, `packed_labels`, ..) -> its documents.
    """

    outputs: Mapping[str, Tokens]
    summary: BlockSummary

    @property
    def tokens(self) -> int:
        """Tokens of the first output."""
        return len(next(iter(self.outputs.values())).ids)


class Handler(Protocol):
    """Makes documents of records. Both methods may run concurrently, `documents` in several threads.

    Attributes:
        outputs: the names of the outputs; each is a file <prefix>_<name>_document.
        columns: the columns of a record that it reads.
    """

    outputs: Sequence[str]
    columns: Sequence[str]

    def prepare(self, block: RecordBlock) -> Prepared:
        """The strings of a block."""

    def documents(self, prepared: Prepared, tokens: Tokens) -> Mapping[str, Tokens]:
        """The documents of each output. May add to `prepared.summary.counts`.

        Args:
            tokens: of `prepared.texts`.
        """


def produce(handler: Handler, prepared: Prepared, encoder: Encoder) -> Produced:
    """Encode the strings that a handler prepared, and let it make documents of the tokens."""
    return Produced(handler.documents(prepared, encoder.encode(prepared.texts)), prepared.summary)
