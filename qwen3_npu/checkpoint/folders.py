"""Folders of checkpoints: what they hold by the names in them, whether they are whole, and how one replaces another.

<root>/latest_checkpointed_iteration.txt    an iteration number, or "release"
<root>/iter_0000001/                        mp_rank_*/model_optim_rng.pt (torch) or .metadata and *.distcp (torch_dist)
<root>/release/                             the same
<directory>/config.json, *.safetensors      a Hugging Face model
<directory>/adapter_config.json             a PEFT adapter

<folder>/integrity.json          {"hash": "xxh3_128", "by": "training", "files": {"common.pt": {"bytes": ..}}}
        /integrity.00003.json    what rank 3 wrote, until rank 0 has joined all of them

Trainings and conversions write `integrity.json` beside the weights: size and digest of each file, computed while it is
written and checked before it is loaded. Older files have no "hash" and hold SHA-256 digests under "sha256".
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_npu.args.convert import HF, MEGATRON
from qwen3_npu.errors import UsageError
from qwen3_npu.files import HASH, Seal, file_digest, rename, write_text
from qwen3_npu.numbers import is_count
from qwen3_npu.schema import read_record, read_small, shown

INTEGRITY, CONVERSION = "integrity.json", "conversion.json"
TRAINING, CONVERTER = "training", "convert_ckpt.py"
Count = Callable[[int], None]

TRACKER = "latest_checkpointed_iteration.txt"
PEFT, TORCH, TORCH_DIST = "peft", "torch", "torch_dist"
COMMON, METADATA, CONFIG = "common.pt", ".metadata", "metadata.json"  # files of the torch_dist format
ADAPTER_CONFIG = "adapter_config.json"
_REMOVED = ".removed"  # a checkpoint that is being deleted; it must not look like one meanwhile
_REPLACED = ".replaced"  # a complete one that another of the same step is about to replace


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A model, adapter or checkpoint on disk.

    Attributes:
        format: `HF` (a model), `PEFT`, `TORCH` or `TORCH_DIST`.
        folder: where its weights are: a directory, or an iteration's folder.
        home: where config.json and tokenizer files are looked for: the directory, or the root of the checkpoint.
        iteration: of a Megatron checkpoint; None: "release".
    """

    format: str
    folder: Path
    home: Path
    iteration: int | None = None

    @property
    def kind(self) -> str:
        """`HF` (model or adapter) or `MEGATRON`."""
        return HF if self.format in (HF, PEFT) else MEGATRON


def iteration_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def iterations(root: Path) -> list[int]:
    """Iterations whose folders exist, the newest first."""
    numbers = (int(p.name[5:]) for p in root.glob("iter_*") if is_count(p.name[5:]) and p.is_dir())
    return sorted({number for number in numbers if (root / iteration_name(number)).is_dir()}, reverse=True)


def read_tracker(root: Path) -> str | None:
    """What the tracker file says: an iteration, "release", or None if there is no such file."""
    path = root / TRACKER
    return read_small(path).decode("utf-8", "replace").strip() if path.exists() else None


def format_of(folder: Path) -> str | None:
    """The format of an iteration's folder, or None if it is none."""
    if any(folder.glob("mp_rank_*")):
        return TORCH
    if any((folder / name).is_file() for name in (METADATA, CONFIG)):
        return TORCH_DIST
    return None


def is_hf_weights(folder: str | Path) -> bool:
    """Whether a directory holds a Hugging Face model's weights."""
    folder = Path(folder)
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def is_peft(folder: str | Path) -> bool:
    """Whether a directory is a PEFT adapter."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def candidates(path: str | Path, iteration: int | None = None, kind: str | None = None) -> list[StoredModel]:
    """The models or checkpoints that a path may mean, in order of preference; empty if there is none.

    A root gives the iteration that its tracker names, then the older sealed ones, for the case that its files are
    damaged. The tracker may be missing (the job was killed before the first one was written), damaged, or name an
    iteration that does not exist: then the sealed iterations are given, the newest first. Only names and the tracker
    are read here.

    Args:
        path: a root, an iteration's folder, a Hugging Face directory or a PEFT directory.
        iteration: the only one that is accepted.
        kind: `HF` or `MEGATRON`, for a folder that is both. By default Megatron is preferred.

    Raises:
        UsageError: the iteration asked for, or the one that the tracker names, does not exist.
    """
    path = Path(path)
    if kind != HF:
        if (form := format_of(path)) is not None:
            return _asked(_iteration(path, path.absolute().parent, form), iteration)
        if found := _iterations(path, iteration):
            return found
    if kind == MEGATRON:
        return []
    if is_peft(path):
        return _asked(StoredModel(PEFT, path, path), iteration)
    if is_hf_weights(path):
        return _asked(StoredModel(HF, path, path), iteration)
    # What is missing of a Hugging Face model that was asked for, its reader says.
    return [StoredModel(HF, path, path)] if kind == HF and not candidates(path, iteration, MEGATRON) else []


def _asked(found: StoredModel, iteration: int | None) -> list[StoredModel]:
    if iteration is not None and found.iteration != iteration:
        what = "one model and no steps" if found.iteration is None else f"step {found.iteration}"
        raise UsageError(f"{found.folder} holds {what}, and step {iteration} is asked for; drop that, or give its root")
    return [found]


def _iteration(folder: Path, root: Path, form: str) -> StoredModel:
    number = folder.name.removeprefix("iter_")
    home = folder if (folder / "config.json").is_file() else root
    return StoredModel(form, folder, home, int(number) if is_count(number) else None)


def _iterations(root: Path, iteration: int | None) -> list[StoredModel]:
    tracked = read_tracker(root)
    there = iterations(root)
    if iteration is not None:
        if tracked is None and not there:
            return []
        names = [iteration_name(iteration)]
        if not (root / names[0]).is_dir():
            raise UsageError(f"{root / names[0]} does not exist; {_listed(there)}")
    elif tracked is None or not (is_count(tracked) or tracked == "release"):
        names = [name for name in map(iteration_name, there) if is_sealed(root / name)]
        if tracked is not None and not names:
            raise UsageError(f"{root / TRACKER} says {shown(tracked)}; an iteration number or 'release' is expected")
    else:
        named = tracked if tracked == "release" else iteration_name(int(tracked))
        # Those after it were finished when the tracker could no longer be written; only if it is gone they count.
        older = [i for i in there if tracked != "release" and i < int(tracked)] if (root / named).is_dir() else there
        names = [named, *(name for name in map(iteration_name, older) if is_sealed(root / name))]
    return [_iteration(root / name, root, format_of(root / name) or TORCH) for name in names]


def _listed(there: list[int]) -> str:
    return f"iterations there: {', '.join(map(iteration_name, reversed(there))) or 'none'}"


def incomplete(root: Path, folder: Path) -> str:
    """A problem of an iteration's folder that its names show; empty if there is none."""
    if not folder.is_dir():
        return f"{folder} does not exist; {_listed(iterations(root))}"
    if format_of(folder) is None:
        return f"{folder} holds neither mp_rank_* folders nor .metadata; the checkpoint is incomplete"
    return ""


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


def move_to_backup(folder: Path) -> None:
    """Rename a checkpoint of the same step to a backup. If the process is killed before the new one is visible,
    `restore_backup` undoes it.
    """
    backup = folder.with_name(folder.name + _REPLACED)
    if folder.exists():
        remove(backup)
        rename(folder, backup)


def restore_backup(root: Path) -> None:
    """Restore the backup of a checkpoint whose replacement was not finished."""
    for backup in root.glob(f"iter_*{_REPLACED}"):
        if not (folder := backup.with_name(backup.name.removesuffix(_REPLACED))).exists():
            rename(backup, folder)


def remove(folder: Path) -> None:
    """Delete a checkpoint. If the process is killed meanwhile, nothing is left that looks like a checkpoint."""
    if folder.exists():
        tmp = folder.with_name(folder.name + _REMOVED)
        shutil.rmtree(tmp, ignore_errors=True)
        rename(folder, tmp)
        shutil.rmtree(tmp)


def clear(root: Path) -> None:
    """Delete backups, and what is left of checkpoints whose deletion was interrupted."""
    for backup in root.glob(f"iter_*{_REPLACED}"):
        remove(backup)
    for leftover in root.glob(f"iter_*{_REMOVED}"):
        shutil.rmtree(leftover, ignore_errors=True)
