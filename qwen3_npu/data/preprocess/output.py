"""The output of a preprocessing run: several indexed datasets that grow together, and where to resume after an
interruption.

During a run there are temporary files and, after the first finished part, <prefix>.unfinished.json with the number of
blocks in them. A part is finished when its bytes are on the disk. --resume truncates the files after the last part.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from qwen3_npu import log
from qwen3_npu.data.preprocess.pipeline import Totals
from qwen3_npu.data.text.encoder import Tokens
from qwen3_npu.data.train.token_file import Indexed, IndexedWriter, open_indexed, publish, write_token_index
from qwen3_npu.data.train.token_record import IdRange, TokenRecord, find_record, record_path
from qwen3_npu.errors import UsageError
from qwen3_npu.files import flush, rename, write_text

PART_BYTES = 256 << 20
_PIECE = 4 << 20  # tokens copied at once


class DatasetOutput:
    """The datasets <prefix>_<name>_document of one run."""

    def __init__(self, prefix: str, names: Sequence[str], identity: str, *, resume: bool) -> None:
        """Start, or resume where an earlier run with the same `identity` finished a part.

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
            self.writers = {name: IndexedWriter(p, positions.get(name)) for name, p in self.prefixes.items()}
        except OSError as error:
            raise UsageError(f"--output-prefix {prefix}: {error.strerror or error}; choose another") from None
        if not resume and self.record.exists():
            log.info(f"starting anew; --resume would continue the unfinished run that {self.record} describes")
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
        """If enough was written since the last part: flush it to the disk, then write the record."""
        if self.unsaved < PART_BYTES:
            return
        positions = {name: writer.position() for name, writer in self.writers.items()}
        saved = {"identity": self.identity, "positions": positions, "totals": vars(self.totals)}
        write_text(self.record, json.dumps(saved))
        self.unsaved = 0

    def publish(self, made: Mapping[str, object]) -> None:
        """Make everything visible.

        Args:
            made: settings that determine the tokens (`TokenRecord.made`).
        """
        for writer in self.writers.values():
            writer.made = made
        publish(list(self.writers.values()))
        self.record.unlink(missing_ok=True)

    def resumable(self) -> bool:
        """Whether --resume is possible."""
        return self.record.exists()

    def remove(self) -> None:
        """Delete everything that is not published."""
        for writer in self.writers.values():
            writer.abort()
        self.record.unlink(missing_ok=True)


def merge_datasets(folders: Sequence[str], keys: Sequence[str], prefix: str) -> None:
    """Join all pairs in a folder whose names hold a key, in the order of their names, to <prefix>_<key>.

    Raises:
        UsageError: no such pairs, half a pair, or pairs of different kinds.
    """
    if len(folders) != 1 or not Path(folders[0]).is_dir():
        raise UsageError(f"--input {' '.join(folders)}: --merge-group-keys takes one folder of .bin/.idx pairs")
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    for key in keys:
        _merge(Path(folders[0]), key, f"{prefix}_{key}")


def _merge(folder: Path, key: str, target: str) -> None:
    paths = [p for p in folder.iterdir() if p.suffix in (".bin", ".idx") and key in p.stem and p.is_file()]
    prefixes = sorted({str(p.with_suffix("")) for p in paths} - {target})
    if not prefixes:
        raise UsageError(f"--merge-group-keys {key}: no .bin/.idx pair in {folder} has it in its name")
    parts = [open_indexed(p, "--merge-group-keys") for p in prefixes]
    if len({part.index.dtype for part in parts}) > 1:
        raise UsageError(f"--merge-group-keys {key}: the pairs in {folder} hold different types of numbers")
    sequences = np.cumsum([0, *(len(part) for part in parts)])
    boundaries = np.concatenate(
        [[0], *(p.index.boundaries[1:] + before for p, before in zip(parts, sequences, strict=False))]
    )
    ids, made = IdRange(), _made(prefixes, key)
    try:
        with open(target + ".bin.tmp", "wb") as file:
            for part in parts:
                for tokens in _in_order(part):
                    file.write(tokens.data)
                    ids += IdRange.of(tokens)
            flush(file)
        with open(target + ".idx.tmp", "wb") as file:
            write_token_index(
                file, np.concatenate([p.lengths for p in parts]), boundaries.astype(np.int64), parts[0].index.dtype
            )
            flush(file)
        for path in (Path(target + ".idx"), record_path(target)):
            path.unlink(missing_ok=True)
        for extension in (".bin", ".idx"):
            rename(target + extension + ".tmp", target + extension)
        TokenRecord(ids, made).write(record_path(target), target)
    except OSError as error:
        raise UsageError(f"--output-prefix: {target} cannot be written: {error.strerror}") from None
    log.info(f"written: {target}.bin .idx: {len(boundaries) - 1} documents of {len(parts)} pairs")


def _in_order(part: Indexed) -> Iterator[np.ndarray]:
    """The tokens of a pair in the order of its sequences."""
    if not part.index.in_order:
        yield from (part[number] for number in range(len(part)))
        return
    for start in range(0, len(part.tokens), _PIECE):
        yield part.tokens[start : start + _PIECE]


def _made(prefixes: Sequence[str], key: str) -> Mapping[str, object]:
    """The settings with which all pairs were made; empty if they are not known for every pair.

    Raises:
        UsageError: the settings differ, so the pairs do not fit into one training.
    """
    records = {prefix: found.made for prefix in prefixes if (found := find_record(prefix)) and found.made}
    for prefix, made in records.items():
        first, expected = next(iter(records.items()))
        if differing := [name for name in {**expected, **made} if expected.get(name) != made.get(name)]:
            what = ", ".join(f"{name} {expected.get(name)} and {made.get(name)}" for name in sorted(differing))
            raise UsageError(
                f"--merge-group-keys {key}: {first} and {prefix} were made differently ({what}); preprocess one again"
            )
    if 0 < len(records) < len(prefixes):
        log.warning(
            f"--merge-group-keys {key}: how {next(p for p in prefixes if p not in records)} was made is unknown"
        )
    return next(iter(records.values())) if len(records) == len(prefixes) else {}
