"""The output of a preprocessing run: several indexed datasets that grow together, and where to go on after a kill.

While it runs there are temporary files and, from the first finished part on, <prefix>.unfinished.json, which says how
many blocks they hold. A part is finished when its bytes are on the disk; what lies behind it is cut off by --resume.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_npu import log
from qwen3_npu.data.preprocess.totals import Totals
from qwen3_npu.data.text.encoder import Tokens
from qwen3_npu.data.train.token_file import IndexedWriter, publish
from qwen3_npu.errors import UsageError
from qwen3_npu.files import write_text

PART_BYTES = 256 << 20


class Output:
    """The datasets <prefix>_<name>_document of one run."""

    def __init__(
        self, prefix: str, names: Sequence[str], identity: str, *, made: Mapping[str, Any], resume: bool
    ) -> None:
        """Start, or go on where an earlier run with the same `identity` finished a part.

        Args:
            made: how the tokens are made (`TokenRecord.made`).

        Raises:
            UsageError: the folder cannot be written, or there is nothing to resume.
        """
        self.prefixes = {name: f"{prefix}_{name}_document" for name in names}
        self.record = Path(prefix + ".unfinished.json")
        self.identity, self.totals, self.unsaved = identity, Totals(), 0
        positions: Mapping[str, tuple[int, int]] = {}
        if resume:
            positions = self._earlier()
        try:
            self.record.parent.mkdir(parents=True, exist_ok=True)
            self.writers = {name: IndexedWriter(p, positions.get(name), made) for name, p in self.prefixes.items()}
        except OSError as error:
            raise UsageError(f"--output-prefix {prefix}: {error.strerror or error}; choose another") from None
        if not resume and self.record.exists():
            log.info(f"starting over; --resume would go on with the unfinished run that {self.record} describes")
            self.record.unlink()

    def _earlier(self) -> Mapping[str, tuple[int, int]]:
        if not self.record.exists():
            raise UsageError(f"--resume: {self.record} is not there, so no part was finished; drop --resume")
        saved = json.loads(self.record.read_text(encoding="utf-8"))
        if saved["identity"] != self.identity:
            raise UsageError(f"--resume: inputs, tokenizer or flags changed since {self.record}; drop --resume")
        for field, value in saved["totals"].items():
            setattr(self.totals, field, Counter(value) if isinstance(value, dict) else value)
        return {name: tuple(position) for name, position in saved["positions"].items()}

    def add(self, outputs: Mapping[str, Tokens]) -> None:
        """Append documents of those outputs that this run keeps."""
        for name, writer in self.writers.items():
            writer.add(outputs[name].ids, outputs[name].lengths)
            self.unsaved += outputs[name].ids.nbytes

    def finish_part(self) -> None:
        """Once enough is written: all of it to the disk, then the record."""
        if self.unsaved < PART_BYTES:
            return
        positions = {name: writer.position() for name, writer in self.writers.items()}
        saved = {"identity": self.identity, "positions": positions, "totals": vars(self.totals)}
        write_text(self.record, json.dumps(saved))
        self.unsaved = 0

    def publish(self) -> None:
        """Make everything visible."""
        publish(list(self.writers.values()))
        self.record.unlink(missing_ok=True)

    def resumable(self) -> bool:
        """Whether --resume could go on."""
        return self.record.exists()

    def remove(self) -> None:
        """Drop everything that is not published."""
        for writer in self.writers.values():
            writer.abort()
        self.record.unlink(missing_ok=True)
