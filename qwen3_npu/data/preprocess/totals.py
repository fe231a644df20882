"""Sums over a run."""

from __future__ import annotations

import dataclasses
from collections import Counter

from qwen3_npu.data.preprocess.handler import Produced


@dataclasses.dataclass
class Totals:
    """Sums over all blocks so far.

    Attributes:
        blocks, records: that were read.
        bad: records that cannot be used.
        documents, tokens: of each output.
        counts: what else happened to records.
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
        self.records += produced.records
        self.counts.update(produced.counts)
        for name, tokens in produced.outputs.items():
            self.documents[name] += len(tokens.lengths)
            self.tokens[name] += len(tokens.ids)

    def __str__(self) -> str:
        parts = [f"{self.records} records", *(f"{n} {what}" for what, n in self.counts.items() if n)]
        if self.bad:
            parts.append(f"{self.bad} broken records left out")
        return ", ".join(parts)
