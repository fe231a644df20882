"""Compute a value from a file in one process of a node, for all processes of the job on that node. No torch.

Thousands of processes that read the same file are a heavy load for a shared file system.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from qwen3_npu import schema
from qwen3_npu.distributed.environment import job_names, local_size


def once_a_node(what: str, path: Path, compute: Callable[[Path], str]) -> str:
    """`compute(path)`, computed by one process of this node; the others wait for its result.

    The result is computed again when size, time or inode of the file change. A single process computes it directly. So
    does each process if the path is no file, to raise the error.

    Args:
        what: name of the computation; different computations of the same file have different names.
    """
    if local_size(1) == 1 or not path.is_file():
        return compute(path)
    stat = path.stat()
    names = [*job_names(), what, str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    key = hashlib.sha256("\0".join(map(str, names)).encode()).hexdigest()[:32]
    note = _folder() / key
    with open(note, "a+", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        said = file.read()
        if said.endswith("\n"):
            return said[:-1]
        answer = compute(path)
        file.truncate(0)
        file.write(answer + "\n")
        file.flush()
    atexit.register(_forget, note)
    return answer


def shared_record(path: Path) -> schema.Record:
    """The JSON object in a file that all processes of a job need: one process of each node reads it.

    Raises:
        UsageError: see `schema.read_record`.
    """

    def text(path: Path) -> str:
        return json.dumps(schema.read_record(path).fields)

    return schema.record(json.loads(once_a_node("json", path, text)), str(path))


def _folder() -> Path:
    """A private folder of this user on this node."""
    folder = Path(tempfile.gettempdir()) / f"qwen3_npu-once-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    stat = folder.lstat()
    if stat.st_uid != os.getuid() or stat.st_mode & 0o077 or not os.path.isdir(folder) or folder.is_symlink():
        return Path(tempfile.mkdtemp(prefix="qwen3_npu-once-"))  # another user's: every process works for itself
    return folder


def _forget(note: Path) -> None:
    with contextlib.suppress(OSError):
        note.unlink()
