"""Files that are complete at every moment: written under a temporary name, flushed to disk, renamed. No torch.

Every file and folder of this package becomes visible through `rename`, directly or through the functions below.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from qwen3_npu.errors import UsageError

_BLOCK = 8 << 20


def flush(file: IO[Any]) -> None:
    """Flush an open file to disk."""
    file.flush()
    os.fsync(file.fileno())


def rename(old: str | Path, new: str | Path) -> None:
    """Give a finished file or folder its final name; an existing file is replaced."""
    os.replace(old, new)


@contextlib.contextmanager
def replacing(path: str | Path, *, binary: bool = False, concurrent: bool = False) -> Iterator[IO[Any]]:
    """A file open for writing. It is flushed and gets its name when the block ends, and is deleted if the block fails.

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
    """A small file in UTF-8, atomically; see `replacing`. Lone surrogates, which UTF-8 lacks, become their escapes."""
    with replacing(path, concurrent=concurrent) as file:
        file.write(text)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk; call it after renames."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Flush the names in a folder and in its subfolders to disk."""
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        sync_folder(path)


def same_folder(one: str, other: str) -> bool:
    """Whether two paths are the same folder."""
    return Path(one).resolve() == Path(other).resolve()


def check_writable(folder: Path, flag: str) -> None:
    """Make a folder and test whether it can be written, before anything slow. Raises: UsageError: `flag` names one
    that cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"{flag} {folder} cannot be written: {error.strerror}; choose another {flag}") from None


def check_writable_later(folder: Path, flag: str) -> None:
    """As `check_writable`; folders that were made for the test are removed again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        check_writable(folder, flag)
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # not made, or used by another process already
                path.rmdir()


class Digest(Protocol):
    """A hash object, of hashlib or xxhash."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


class Seal(NamedTuple):
    """Size and digest of a finished file."""

    bytes: int
    digest: str


class SealedFile:
    """A file written from start to end, whose digest is computed from memory while it is written."""

    def __init__(self, path: str | Path) -> None:
        self.file = open(path, "wb", buffering=0)
        self.hash = hashing(HASH)
        self.size = 0

    def write(self, data: bytes | memoryview, /) -> int:
        """Write all of the data."""
        self.hash.update(data)
        view = memoryview(data)
        while view:
            view = view[self.file.write(view) :]
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """Do nothing: writes are not buffered."""

    def close(self) -> Seal:
        """Flush to disk."""
        os.fsync(self.file.fileno())
        self.file.close()
        return Seal(self.size, self.hash.hexdigest())


# The hash of new files: 128 bits of xxHash3, 17 times as fast as SHA-256 here. It detects damage, not manipulation.
HASH = "xxh3_128"


def hashing(name: str) -> Digest:
    """A new hash object of this name (xxHash's or hashlib's). Raises: UsageError: it is not known."""
    if name not in (HASH, "sha256"):
        raise UsageError(f"hash {name!r} is not known; {HASH} and sha256 are")
    if name == "sha256":
        return hashlib.sha256()
    import xxhash  # here: flags are parsed without it

    return xxhash.xxh3_128()


def file_digest(path: Path, name: str = HASH, count: Callable[[int], None] = lambda done: None) -> str:
    """The digest of a file; `count` is called with the size of every block."""
    found, block = hashing(name), bytearray(_BLOCK)
    with open(path, "rb", buffering=0) as file:
        while done := file.readinto(block):
            found.update(memoryview(block)[:done])
            count(done)
    return str(found.hexdigest())
