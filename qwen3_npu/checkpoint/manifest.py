"""Whether a checkpoint is complete: size and digest of each file, computed while it is written, checked before loading.

<folder>/integrity.json          {"hash": "xxh3_128", "by": "training", "files": {"common.pt": {"bytes": ..}}}
        /integrity.00003.json    what rank 3 wrote, until rank 0 has joined all of them
<output>/conversion.json         of a conversion: its source, its target and the xxh3_128 digest of every tensor

Trainings and conversions both write `integrity.json` beside the weights. Older files have no "hash" and hold SHA-256
digests under "sha256".
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_npu import __version__
from qwen3_npu.errors import UsageError
from qwen3_npu.files import HASH, Seal, file_digest, write_text
from qwen3_npu.schema import read_record

INTEGRITY, CONVERSION = "integrity.json", "conversion.json"
TRAINING, CONVERTER = "training", "convert_ckpt.py"
Count = Callable[[int], None]


def _uncounted(done: int) -> None:
    """Counts nothing."""


def write_integrity(folder: Path, by: str, seals: Mapping[str, Seal]) -> None:
    """Seal a folder whose files are finished.

    Args:
        by: `TRAINING` or `CONVERTER`.
        seals: of every file, by its path relative to the folder.
    """
    files = {name: seal._asdict() for name, seal in sorted(seals.items())}
    write_text(folder / INTEGRITY, json.dumps({"hash": HASH, "by": by, "files": files}, indent=1) + "\n")


def part(rank: int) -> str:
    """Name of the file in which one rank records the size and digest of its files."""
    return f"integrity.{rank:05d}.json"


def write_part(folder: Path, rank: int, seals: Mapping[str, Seal], notes: object = None) -> None:
    """Record that a rank has finished its files; `notes` are for the rank that writes the common files."""
    write_text(folder / part(rank), json.dumps({"files": seals, "notes": notes}))


def read_parts(folder: Path, ranks: Sequence[int]) -> tuple[dict[str, Seal], list[Any]]:
    """The seals of all ranks' files, and their notes."""
    parts = [json.loads((folder / part(rank)).read_text(encoding="utf-8")) for rank in ranks]
    seals = {name: Seal(*seal) for said in parts for name, seal in said["files"].items()}
    return seals, [said["notes"] for said in parts]


def drop_parts(folder: Path, ranks: Sequence[int]) -> None:
    """Delete the parts once `write_integrity` has joined them."""
    for rank in ranks:
        (folder / part(rank)).unlink()


@dataclasses.dataclass(frozen=True)
class Integrity:
    """What `integrity.json` says.

    Attributes:
        hash: name of the hash.
        by: what wrote the files.
        files: path relative to the folder -> size and digest.
    """

    hash: str
    by: str
    files: dict[str, Seal]

    def share(self, rank: int, ranks: int) -> list[str]:
        """The files that one of several ranks checks: the largest is the first rank's, the next the second's."""
        return sorted(self.files, key=lambda name: (-self.files[name].bytes, name))[rank::ranks]

    def share_bytes(self, rank: int, ranks: int) -> int:
        return sum(self.files[name].bytes for name in self.share(rank, ranks))


def is_sealed(folder: Path) -> bool:
    """Whether the folder has an integrity.json, so that its files are complete and can be checked."""
    return os.path.lexists(folder / INTEGRITY)  # of whatever kind: reading says what is wrong with it


def is_trained(folder: Path) -> bool:
    """Whether a training sealed it, not a conversion."""
    try:
        return is_sealed(folder) and read_integrity(folder).by == TRAINING
    except UsageError:
        return False


def read_integrity(folder: Path) -> Integrity:
    """The integrity.json of a sealed folder. Raises: UsageError: it cannot be read."""
    path = folder / INTEGRITY
    content = read_record(path)
    name = content.text("hash") if "hash" in content.fields else "sha256"
    by = content.text("by") if "by" in content.fields else TRAINING
    said, files, key = content.record("files"), {}, "digest" if "hash" in content.fields else "sha256"
    for file in said.fields:
        seal = said.record(file)
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise UsageError(f"{path} names {file!r}, which lies elsewhere")
        files[file] = Seal(seal.integer("bytes", least=0), seal.text(key))
    return Integrity(name, by, files)


def damage(
    folder: Path, rank: int = 0, ranks: int = 1, count: Count = _uncounted, *, said: Integrity | None = None
) -> list[str]:
    """What is wrong with a sealed folder, a line each.

    Args:
        rank, ranks: the files are divided among the ranks; this rank checks its own.
        count: told of the bytes read.
        said: the content of integrity.json, if it has been read.
    """
    try:
        said = said or read_integrity(folder)
    except UsageError as error:
        return [f"{folder / INTEGRITY} cannot be read: {error}"]
    found = (_wrong(folder / name, said.files[name], said.hash, count) for name in said.share(rank, ranks))
    return [line for line in found if line]


def _wrong(path: Path, seal: Seal, hash_name: str, count: Count) -> str | None:
    try:
        size = path.stat().st_size
        if size != seal.bytes:
            return f"{path} has {size} bytes, not {seal.bytes}"
        same = file_digest(path, hash_name, count) == seal.digest
        return None if same else f"{path} is damaged: its {hash_name} digest is another"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"


def write_conversion(root: Path, facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `conversion.json`.

    Args:
        facts: what is known of source and target.
        files: path relative to `root` -> {"bytes", name of the hash: tensor -> digest of its bytes}.
    """
    content = {
        "versions": {"qwen3_npu": __version__, "numpy": np.__version__, "python": platform.python_version()},
        **facts,
        "files": files,
    }
    write_text(root / CONVERSION, json.dumps(content, indent=1) + "\n")
