"""Files that are whole at every moment: written under a temporary name, flushed to disk, renamed. No torch.

Every file and folder of this package becomes visible through `rename`, directly or through the functions below.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from qwen3_npu.errors import UsageError


def flush(file: IO[Any]) -> None:
    """What was written to an open file is on the disk when this returns."""
    file.flush()
    os.fsync(file.fileno())


def rename(old: str | Path, new: str | Path) -> None:
    """Give a finished file or folder its name, in place of a file that has it."""
    os.replace(old, new)


@contextlib.contextmanager
def replacing(path: str | Path, *, binary: bool = False, concurrent: bool = False) -> Iterator[IO[Any]]:
    """A file open for writing that gets its name when the block ends, flushed to disk; dropped if the block fails.

    Args:
        concurrent: other processes may write the same path at once; the last one wins. (Without it a temporary file
            that a killed process left is written over by the next one.)
    """
    temporary = f"{path}.{os.getpid()}.tmp" if concurrent else f"{path}.tmp"
    try:
        with (
            open(temporary, "wb")
            if binary
            else open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file
        ):
            yield file
            flush(file)
        rename(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str, *, concurrent: bool = False) -> None:
    """A small file, atomically; see `replacing`. UTF-8; half a surrogate pair is written as its escape."""
    with replacing(path, concurrent=concurrent) as file:
        file.write(text)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk: after renames."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Flush the names in a folder and in its folders to disk."""
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        sync_folder(path)


def same_folder(one: str, other: str) -> bool:
    """Whether two names mean one folder."""
    return Path(one).resolve() == Path(other).resolve()


def check_writable(folder: Path, flag: str) -> None:
    """Make a folder and try it, before anything costly. Raises: UsageError: `flag` names one that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"{flag} {folder} cannot be written: {error.strerror}; choose another {flag}") from None
