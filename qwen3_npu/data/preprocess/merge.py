"""`--merge-group-keys`: join pairs of files that were made in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_npu import log
from qwen3_npu.data.train.token_file import Indexed, open_indexed, write_index
from qwen3_npu.data.train.token_record import IdRange, TokenRecord, find_record, record_path
from qwen3_npu.errors import UsageError
from qwen3_npu.files import flush, rename

_PIECE = 4 << 20  # tokens copied at once


def merge(folders: Sequence[str], keys: Sequence[str], prefix: str) -> None:
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
    ids = IdRange()
    try:
        with open(target + ".bin.tmp", "wb") as file:
            for part in parts:
                for tokens in _in_order(part):
                    file.write(tokens.data)
                    ids += IdRange.of(tokens)
            flush(file)
        with open(target + ".idx.tmp", "wb") as file:
            write_index(
                file, np.concatenate([p.lengths for p in parts]), boundaries.astype(np.int64), parts[0].index.dtype
            )
            flush(file)
        for path in (Path(target + ".idx"), record_path(target)):
            path.unlink(missing_ok=True)
        for extension in (".bin", ".idx"):
            rename(target + extension + ".tmp", target + extension)
        TokenRecord(ids, _made(prefixes)).write(record_path(target), target)
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


def _made(prefixes: Sequence[str]) -> Mapping[str, Any]:
    """How all of the pairs were made; empty if they were made in different ways."""
    records = [find_record(prefix) for prefix in prefixes]
    first = records[0].made if records[0] else {}
    return first if all(record is not None and record.made == first for record in records) else {}
