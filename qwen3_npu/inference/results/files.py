"""Files of results: each appears only when it is complete, and before anything is shown on the console."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from qwen3_npu import files
from qwen3_npu.errors import UsageError

RESULT = "text_generation_result"


def write_result(path: Path, text: str) -> None:
    """Write a file atomically.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        files.write_text(path, text)
    except OSError as error:
        raise UsageError(
            f"--output-dir: {path} cannot be written: {error.strerror}; free some space and run again"
        ) from None


def write_json(path: Path, content: object) -> None:
    """Write a value as indented JSON, atomically."""
    write_result(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def write_lines(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Write one record per line, atomically."""
    write_result(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write_generated(folder: Path, results: Iterable[Mapping[str, object]]) -> list[Path]:
    """Write both files of generated texts: .jsonl with all fields, .txt for reading."""
    results = list(results)
    paths = [folder / f"{RESULT}.jsonl", folder / f"{RESULT}.txt"]
    write_lines(paths[0], results)
    write_result(paths[1], "".join(f"[{r['task']}]\n{r['prompt']}\n---\n{r['answer']}\n\n" for r in results))
    return paths
