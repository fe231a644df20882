"""Is a checkpoint of a training whole? Size and SHA-256 of each of its files, written last and checked before loading.

<root>/iter_0000010/integrity.json        {"files": {"mp_rank_00/model_optim_rng.pt": {"bytes": 1, "sha256": ""}, ..}}
                   /integrity.00003.json  what rank 3 wrote, until rank 0 has put all of them together
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from qwen3_npu.files import write_text

MANIFEST = "integrity.json"
_BLOCK = 8 << 20


def part(rank: int) -> str:
    """Name of what one rank says of its files."""
    return f"integrity.{rank:05d}.json"


def sha256(path: Path, count: Callable[[int], None] = lambda done: None) -> str:
    """The digest of a file; `count` is told of every block's bytes."""
    digest, block = hashlib.sha256(), bytearray(_BLOCK)
    with open(path, "rb", buffering=0) as file:
        while done := file.readinto(block):
            digest.update(memoryview(block)[:done])
            count(done)
    return digest.hexdigest()


def seal(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Size and digest of finished files of a folder."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}


def write_part(folder: Path, rank: int, names: Iterable[str], notes: Any) -> None:
    """Say that a rank has finished its files; `notes` are for the rank that puts everything together."""
    write_text(folder / part(rank), json.dumps({"files": seal(folder, names), "notes": notes}))


def read_parts(folder: Path, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """What the ranks have said."""
    return [json.loads((folder / part(rank)).read_text(encoding="utf-8")) for rank in ranks]


def write_manifest(folder: Path, parts: Iterable[dict[str, Any]], names: Iterable[str], ranks: Sequence[int]) -> None:
    """Put the ranks' parts together, with further files that are sealed here."""
    files = seal(folder, names)
    for said in parts:
        files |= said["files"]
    write_text(folder / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")
    for rank in ranks:
        (folder / part(rank)).unlink()


def is_sealed(folder: Path) -> bool:
    """Whether the folder is a training's checkpoint that was finished."""
    return (folder / MANIFEST).is_file()


def damage(folder: Path, rank: int = 0, ranks: int = 1, count: Callable[[int], None] = lambda done: None) -> list[str]:
    """What is wrong with a sealed folder, a line each.

    Args:
        rank, ranks: the files are shared out; this rank looks at its own.
        count: told of the bytes read.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        shares = sorted(files, key=lambda name: -files[name]["bytes"])[rank::ranks]
        return [line for name in shares if (line := _wrong(folder / name, files[name], count))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{folder / MANIFEST} cannot be read"]


def _wrong(path: Path, said: dict[str, Any], count: Callable[[int], None]) -> str | None:
    try:
        size = path.stat().st_size
        if size != said["bytes"]:
            return f"{path} has {size} bytes, not {said['bytes']}"
        return None if sha256(path, count) == said["sha256"] else f"{path} is damaged: its SHA-256 is another"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"


def share_bytes(folder: Path, rank: int, ranks: int) -> int:
    """Bytes that a rank reads in `damage`; 0 if the manifest cannot be read."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return sum(sorted((said["bytes"] for said in files.values()), reverse=True)[rank::ranks])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0
