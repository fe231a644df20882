"""Find the files of `--input`: files, folders, patterns, dataset folders. Formats are never guessed."""

from __future__ import annotations

import dataclasses
import glob
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from qwen3_npu.errors import UsageError

LINES, JSON, PARQUET, ARROW, CSV, TEXT, WIKITEXT = "jsonl", "json", "parquet", "arrow", "csv", "txt", "wikitext"
_FORMATS = {
    ".jsonl": LINES,
    ".json": JSON,
    ".parquet": PARQUET,
    ".arrow": ARROW,
    ".csv": CSV,
    ".txt": TEXT,
    ".tokens": WIKITEXT,
    ".raw": WIKITEXT,
}
# Formats that may be in one folder together.
_FAMILIES = {LINES: "json", JSON: "json"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# Files of a dataset folder that describe it.
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclasses.dataclass(frozen=True)
class InputFile:
    """One file to read.

    Attributes:
        format: one of the constants above.
        compression: "gzip", "zstd" or None.
        size: bytes on disk.
    """

    path: Path
    format: str
    compression: str | None
    size: int


def known_formats() -> str:
    """For messages."""
    return f"{' '.join(_FORMATS)} ({' or '.join(_COMPRESSIONS)} may follow)"


def find_files(inputs: Sequence[str]) -> list[InputFile]:
    """The data files that `inputs` name, in the order of the names given and of the file names within each.

    Raises:
        UsageError: a file is missing, its format is unknown, or a folder holds several formats.
    """
    return [file for name in inputs for file in _find(name)]


def exists(name: str) -> bool:
    """Whether a file, folder or pattern with this name is there."""
    return Path(name).exists() or bool(glob.glob(name))


def _find(name: str) -> list[InputFile]:
    path = Path(name)
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        return [_checked(path)]
    matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
    files = [_checked(match) for match in matches if match.is_file()]
    if not files:
        raise UsageError(f"--input {name}: no such file or folder, and no file matches it as a pattern")
    return files


def _checked(path: Path) -> InputFile:
    file = _describe(path)
    if file is None:
        if path.suffix == ".py":
            raise UsageError(f"--input {path}: loading scripts are not run; convert the data to .jsonl or .parquet")
        raise UsageError(f"--input {path}: unknown format; known: {known_formats()}")
    if file.size == 0:
        raise UsageError(f"--input {path}: the file is empty")
    return file


def _describe(path: Path) -> InputFile | None:
    """The file, if its name tells a known format."""
    compression = _COMPRESSIONS.get(path.suffix)
    format_ = _FORMATS.get(Path(path.stem).suffix if compression else path.suffix)
    if format_ is None or (compression and format_ in (PARQUET, ARROW)):
        return None
    return InputFile(path, format_, compression, path.stat().st_size)


def _of_folder(folder: Path) -> list[InputFile]:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
        if len(splits) == 1:
            return _of_folder(folder / splits[0])
        raise UsageError(
            f"--input {folder}: a dataset with several splits; name one: {' or '.join(str(folder / s) for s in splits)}"
        )
    if (folder / "state.json").is_file():
        return _saved_dataset(folder)
    for place in (folder, folder / "data"):
        # Hidden files belong to the system (.DS_Store, ._part.jsonl), or are not finished.
        paths = sorted(p for p in place.glob("[!.]*") if p.is_file() and p.name not in _NOT_DATA)
        if files := [file for file in map(_describe, paths) if file]:
            break
    else:
        raise UsageError(f"--input {folder}: no data files there; known formats: {known_formats()}")
    families = Counter(_FAMILIES.get(file.format, file.format) for file in files)
    if len(families) > 1:
        found = ", ".join(f"{count} {family}" for family, count in families.most_common())
        raise UsageError(f"--input {folder}: several formats ({found}); give a pattern such as '{folder}/*.parquet'")
    return [_checked(file.path) for file in files]


def _saved_dataset(folder: Path) -> list[InputFile]:
    """The Arrow files of `datasets`' save_to_disk, in their order."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state.get("_indices_data_files"):
        raise UsageError(f"--input {folder}: saved with an index of rows; save it again after flatten_indices()")
    return [_checked(folder / entry["filename"]) for entry in state.get("_data_files", [])]
