"""Results of an unfinished run, written as they are made: a restarted run continues where the interrupted one stopped.

<name>.unfinished.<copy>.jsonl in the output folder, one file for each copy of the model: a line with the settings of
the run, then a line for each result. The files are deleted when the results are in their final files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from qwen3_npu import log
from qwen3_npu.args.inference import WeightArgs
from qwen3_npu.checkpoint.formats.open import find
from qwen3_npu.files import write_text
from qwen3_npu.inference.runner import Runner

JournalEntry = dict[str, Any]


class Journal:
    """Results so far, on every process.

    Attributes:
        entries: results of an earlier, killed run with the same settings.
    """

    def __init__(self, runner: Runner, folder: Path, name: str, asked: Mapping[str, object], *, resume: bool) -> None:
        """Read existing results and start to write. Every process calls it.

        Args:
            asked: all settings on which results depend. An earlier run with other settings is not continued.
            resume: continue an earlier run; otherwise its results are dropped.
        """
        self.path = folder / f"{name}.unfinished.{runner.data_rank}.jsonl"
        identity = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
        found: list[JournalEntry] = []
        if runner.world.rank == 0:
            files = sorted(folder.glob(f"{name}.unfinished.*.jsonl"))
            found = [entry for file in files for entry in _entries(file, identity, resume=resume)]
            _rewrite(self.path, identity, found)
            for file in files:
                if file != self.path:
                    file.unlink()
        # Also a barrier: the others' files are made after rank 0 has removed the old ones.
        self.entries: list[JournalEntry] = runner.agreed(found)
        self.file: TextIO | None = None
        if runner.leads:
            if runner.world.rank != 0:
                _rewrite(self.path, identity, [])
            self.file = self.path.open("a", encoding="utf-8")

    def add(self, **entry: object) -> None:
        """Write a result; only the first process of a copy of the model writes."""
        if self.file is not None:
            self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self.file.flush()

    def close(self) -> None:
        """Close the journal and keep it for the next start."""
        if self.file is not None:
            self.file.close()
            self.file = None

    def remove(self) -> None:
        """Delete the journal, since the results are in their final files."""
        if self.file is not None:
            self.close()
            self.path.unlink(missing_ok=True)


def _entries(file: Path, identity: str, *, resume: bool) -> list[JournalEntry]:
    """The results in a file, without a last line that is incomplete."""
    found: list[JournalEntry] = []
    for line in file.read_bytes().split(b"\n")[:-1]:
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            break
    if not resume:
        log.info(f"--no-resume: {max(len(found) - 1, 0)} results of the unfinished run in {file} are dropped")
        return []
    if not found or found[0].get("identity") != identity:
        log.warning_once(f"{file}: the unfinished run had other settings or another model; it is not continued")
        return []
    if found[1:]:
        log.info(f"resume: {file} has results of an unfinished run ({len(found) - 1} lines); --no-resume starts over")
    return found[1:]


def _rewrite(path: Path, identity: str, entries: list[JournalEntry]) -> None:
    lines = [{"identity": identity}, *entries]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def weights_identity(weights: WeightArgs) -> list[tuple[str, int, int]]:
    """Name, size and modification time of every file of weights."""
    found = []
    for given in filter(None, (weights.load, weights.lora_load)):
        known = find(given, weights.ckpt_step if given == weights.load else None)
        folder = known.folder if known else Path(given)
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            status = file.stat()
            found.append((str(file), status.st_size, status.st_mtime_ns))
    return found
