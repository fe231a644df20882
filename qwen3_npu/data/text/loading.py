"""Tokenizer libraries, loaded in the background while the rest of the program starts. Imports nothing heavy itself."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from qwen3_npu.errors import UsageError

FAST, REFERENCE = "fastokens", "tokenizers"


class Loading(NamedTuple):
    """Libraries on their way.

    Attributes:
        reference: a tokenizers.Tokenizer.
        fast: a fastokens.Tokenizer, or an ImportError or what else keeps it from being used; None: not wanted.
    """

    reference: Future[Any]
    fast: Future[Any] | None


def start_loading(folder: str, backend: str = "auto", threads: int | None = None) -> Loading:
    """Begin to load a tokenizer folder.

    Args:
        backend: "auto", or one library.
        threads: for libraries that have threads of their own; None: the CPUs.

    Raises:
        UsageError: there is no tokenizer.json.
    """
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        found = "holds no tokenizer.json" if Path(folder).is_dir() else "is not a folder"
        raise UsageError(f"--tokenizer-name-or-path {folder}: {found}; give the folder of a downloaded Qwen3 model")
    threads = threads or available_cpus()
    # Both libraries read these when they first encode.
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if threads > 1 else "false")
    pool = ThreadPoolExecutor(2)
    # The slower one to load first.
    fast = pool.submit(_load_fast, str(file)) if backend != REFERENCE else None
    reference = pool.submit(_load_reference, str(file))
    pool.shutdown(wait=False)
    return Loading(reference, fast)


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS lacks it


def _load_reference(file: str) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(file)
    except Exception as error:  # tokenizers raises no narrower type
        raise UsageError(f"{file} cannot be used as a tokenizer: {error}") from None


def _load_fast(file: str) -> Any:
    from fastokens import Tokenizer

    return Tokenizer.from_file(file)
