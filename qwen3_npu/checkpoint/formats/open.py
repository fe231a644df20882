"""Determine what a folder holds, check that it is complete, and open it as a `Source`. Every command opens
checkpoints with these functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen3_npu import log
from qwen3_npu.args.convert import HF, MEGATRON
from qwen3_npu.args.model import ModelArgs, ShapeArgs, arch_from_shapes
from qwen3_npu.checkpoint import folders
from qwen3_npu.checkpoint.folders import (
    PEFT,
    TORCH,
    TORCH_DIST,
    TRACKER,
    StoredModel,
    candidates,
    incomplete,
    read_tracker,
)
from qwen3_npu.checkpoint.formats import dist_write, torch_write
from qwen3_npu.checkpoint.formats.adapters import MergedSource, PlainLora, SharedA
from qwen3_npu.checkpoint.formats.dist_read import DistReader
from qwen3_npu.checkpoint.formats.huggingface import HfReader, open_hf
from qwen3_npu.checkpoint.formats.megatron_args import arch_from_args
from qwen3_npu.checkpoint.formats.peft import PeftReader
from qwen3_npu.checkpoint.formats.torch_read import MegatronReader, checkpoint_args
from qwen3_npu.checkpoint.formats.torch_write import MegatronWriter
from qwen3_npu.distributed.layout import Rank
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch, from_hf_config, read_hf_config
from qwen3_npu.model.sizes import SIZES
from qwen3_npu.numbers import is_count
from qwen3_npu.progress import Progress

WRITERS: dict[str, MegatronWriter] = {TORCH: torch_write, TORCH_DIST: dist_write}
Checkpoint = HfReader | PeftReader | MegatronReader | DistReader
Opened = Checkpoint | MergedSource | PlainLora | SharedA


class Peers:
    """The processes that open a folder together: here a single one. `checkpoint.training.live.Ranks` is all ranks."""

    rank, ranks = 0, 1

    def agree(self, value: object) -> Any:
        """Rank 0's value."""
        return value

    def first_problem(self, problem: str | None) -> str | None:
        """What the first process with a problem says; None: none has one."""
        return problem


ALONE = Peers()


def find(path: str | Path, iteration: int | None = None, kind: str | None = None) -> StoredModel | None:
    """The model or checkpoint at a path, unchecked; None if there is none. Raises: UsageError: see `candidates`."""
    found = next(iter(candidates(path, iteration, kind)), None)
    if found is not None and found.kind == MEGATRON and (wrong := incomplete(found.home, found.folder)):
        raise UsageError(wrong)
    return found


def find_whole(
    path: str | Path,
    iteration: int | None = None,
    kind: str | None = None,
    peers: Peers = ALONE,
    *,
    flag: str = "--load",
) -> StoredModel | None:
    """The model or checkpoint at a path, its digests checked; None if there is none. Every rank must call this.

    Damaged files are named. Of a root with earlier checkpoints the newest complete one is used, and the log says so.
    Each rank checks some of the files, so each file is read once. A folder without integrity.json is not checked, and
    the log says so.

    Raises: UsageError: there is no complete checkpoint; on every rank.
    """
    options = _agreed_candidates(path, iteration, kind, peers)
    said: list[str] = []
    for found in options:
        wrong = _problems(found, peers)
        if not wrong:
            if found is not options[0]:
                log.info(f"warning: {found.folder} is the newest complete checkpoint and is used")
            return found
        if len(options) > 1:
            for line in wrong:
                log.info(f"warning: damaged checkpoint: {line}")
        said += wrong
    if not options:
        return None
    if options[0].kind == HF:
        raise UsageError(f"{flag} {path} is not what was written: {said[0]}; write it again, or {_REMEDY}")
    tried = ", ".join(found.folder.name for found in options)
    raise UsageError(f"{flag} {path} holds no complete checkpoint (damaged: {tried}; {said[0]})")


_REMEDY = f"delete its {folders.INTEGRITY} if it was changed on purpose"


def _agreed_candidates(path: str | Path, iteration: int | None, kind: str | None, peers: Peers) -> list[StoredModel]:
    """The candidates that rank 0 has found, on every rank."""
    seen: list[StoredModel] | str | None = None
    if peers.rank == 0:
        try:
            seen = candidates(path, iteration, kind)
        except UsageError as error:
            seen = str(error)
    seen = peers.agree(seen)
    if isinstance(seen, str):
        raise UsageError(seen)
    assert seen is not None
    if seen and seen[0].kind == MEGATRON and iteration is None:
        tracked = read_tracker(Path(path)) if peers.rank == 0 else None
        if tracked is not None and not is_count(tracked) and tracked != "release":
            log.info(f"warning: {Path(path) / TRACKER} says no iteration; {seen[0].folder} is the newest there")
    return seen


def _problems(found: StoredModel, peers: Peers) -> list[str]:
    """The problems of a checkpoint, one line each. Every rank must call this."""
    first, said = peers.agree(_seen(found) if peers.rank == 0 else None)  # one process reads the list of files
    if said is None:
        return [first] if first else []
    if peers.rank == 0:
        with Progress(f"checking {found.folder.name}", said.share_bytes(0, peers.ranks), {"bytes": "B"}) as progress:
            mine = folders.damage(found.folder, 0, peers.ranks, lambda done: progress.add(bytes=done), said=said)
    else:
        mine = folders.damage(found.folder, peers.rank, peers.ranks, said=said)
    found_wrong = peers.first_problem("\n".join(mine) or None)
    return found_wrong.splitlines() if found_wrong else []


def _seen(found: StoredModel) -> tuple[str, folders.Integrity | None]:
    """The problems that names show, and the content of integrity.json if the files must be checked."""
    first = _at_first_sight(found)
    if first is not None:
        return first, None
    try:
        return "", folders.read_integrity(found.folder)
    except UsageError as error:
        return f"{found.folder / folders.INTEGRITY} cannot be read: {error}", None


def _at_first_sight(found: StoredModel) -> str | None:
    """The problem; "" if the folder cannot be checked; None if its files must be checked."""
    if folders.is_sealed(found.folder):
        return None
    if found.kind == MEGATRON:
        if wrong := incomplete(found.home, found.folder):
            return wrong
        log.info(f"{found.folder} has no {folders.INTEGRITY}; its files are not checked before they are read")
    return ""


def reader(
    found: StoredModel,
    *,
    hf_config: str | Path | None = None,
    lora_alpha: float | None = None,
    arch: Qwen3Arch | None = None,
    prefer: Rank | None = None,
    ignored: Sequence[str] = (),
) -> Checkpoint:
    """Open what was found.

    Args:
        hf_config: folder of the config.json to use, if the checkpoint's own is missing or wrong.
        lora_alpha: of an adapter whose checkpoint does not say it.
        arch: the architecture of a PEFT adapter's base, if it is known.
        prefer: the rank whose file is read for what several ranks hold.
        ignored: arguments of a Megatron checkpoint that are ignored (--ignore-args).
    """
    if found.format == PEFT:
        return PeftReader(found.folder, arch or _peft_architecture(found.folder, hf_config))
    if found.format == HF:
        return open_hf(found.folder)
    if found.format == TORCH_DIST:
        return DistReader(found, hf_config, lora_alpha, ignored)
    return MegatronReader(found, hf_config, prefer=prefer, lora_alpha=lora_alpha, ignored=ignored)


def open_checkpoint(
    folder: str | Path,
    *,
    kind: str | None = None,
    iteration: int | None = None,
    hf_config: str | Path | None = None,
    lora_alpha: float | None = None,
    arch: Qwen3Arch | None = None,
    ignored: Sequence[str] = (),
) -> Checkpoint:
    """`find` and `reader` in one. Raises: UsageError: there is nothing of the kind, or it is incomplete."""
    found = find(folder, iteration, kind)
    if found is None:
        raise UsageError(nothing_there(folder, kind))
    return reader(found, hf_config=hf_config, lora_alpha=lora_alpha, arch=arch, ignored=ignored)


def nothing_there(folder: str | Path, kind: str | None) -> str:
    """The message for a path that cannot be opened: what it is instead."""
    path, other = Path(folder), None
    if not path.exists():
        return f"{folder} does not exist"
    rank = path if path.is_dir() else path.parent
    if rank.name.startswith("mp_rank_"):
        return f"{folder} is one rank's part of a checkpoint; give {rank.parent}"
    if not path.is_dir():
        return f"{folder} is a file; give the folder of a model or checkpoint, as {path.parent}"
    if kind is not None:
        other = next(iter(candidates(folder)), None)
    if other is not None and kind == HF:
        return f"{folder} holds a Megatron checkpoint; give --load-model-type mg"
    if other is not None:
        what = "adapter" if other.format == PEFT else "model"
        return f"{folder} holds a Hugging Face {what}; give --load-model-type hf"
    if kind == MEGATRON:
        return f"{folder} is not a Megatron checkpoint: it has no {TRACKER}"
    if any(path.glob("*.bin")):
        return f"{folder} holds no .safetensors file; it has pytorch_model*.bin: save it as safetensors"
    if (path / "config.json").is_file():
        return f"{folder} has a config.json and no weights (*.safetensors)"
    return f"{folder} holds no Hugging Face model, no Megatron checkpoint and no PEFT adapter"


def _peft_architecture(folder: Path, hf_config: str | Path | None) -> Qwen3Arch:
    if hf_config is None:
        raise UsageError(f"{folder} is a PEFT adapter; give the folder of its model's config.json with --hf-cfg-dir")
    return from_hf_config(read_hf_config(hf_config), str(Path(hf_config) / "config.json"))


@dataclasses.dataclass(frozen=True)
class Sources:
    """The input of a conversion; every worker process opens it by itself.

    Attributes:
        load, kind: folder of the model or adapter, and its kind by the flags.
        lora_load: adapter to merge into it.
        merge: merge the adapter that is in `load` itself.
        shared_a: give a PEFT adapter the form of a Megatron one.
        plain: give a PiSSA adapter the form of LoRA.
        ignored: arguments of a Megatron checkpoint that are not looked at.
    """

    load: str
    kind: str | None = None
    iteration: int | None = None
    hf_config: str | None = None
    lora_load: str | None = None
    lora_alpha: float | None = None
    merge: bool = False
    shared_a: bool = False
    plain: bool = False
    ignored: tuple[str, ...] = ()

    def checked(self, flag: str = "--load", peers: Peers = ALONE) -> tuple[Sources, Path]:
        """The same with the folders of whole checkpoints, and where config.json and tokenizer files of the first are.

        Every rank must call this.

        Raises:
            UsageError: something is not there, or damaged.
        """
        found = find_whole(self.load, self.iteration, self.kind, peers, flag=flag)
        if found is None:
            raise UsageError(f"{flag} {nothing_there(self.load, self.kind)}")
        adapter = find_whole(self.lora_load, peers=peers, flag="--lora-load") if self.lora_load else None
        if self.lora_load and adapter is None:
            raise UsageError(f"--lora-load {nothing_there(self.lora_load, None)}")
        lora_load = str(adapter.folder) if adapter else None
        return dataclasses.replace(self, load=str(found.folder), iteration=None, lora_load=lora_load), found.home

    def open_base(self) -> Checkpoint:
        return open_checkpoint(
            self.load,
            kind=self.kind,
            iteration=self.iteration,
            hf_config=self.hf_config,
            lora_alpha=self.lora_alpha,
            ignored=self.ignored,
        )

    def open_adapter(self, base: Checkpoint) -> Checkpoint:
        """Open the adapter of --lora-load. Raises: UsageError: there is none, or it belongs to another model."""
        assert self.lora_load is not None
        adapter = open_checkpoint(self.lora_load, lora_alpha=self.lora_alpha, arch=base.arch, ignored=self.ignored)
        if adapter.contents.lora is None:
            raise UsageError(
                f"--lora-load {self.lora_load} holds a model and no LoRA tensors; give an adapter's folder, or drop it"
            )
        if not (adapter.arch.same_weights(base.arch) or adapter.arch.same_weights(base.arch.as_reward())):
            raise UsageError(f"--lora-load {self.lora_load} is for {adapter.arch}, but {self.load} holds {base.arch}")
        if isinstance(adapter, PeftReader):
            adapter.check_carried(base)
        return adapter

    def __call__(self) -> Opened:
        base = self.open_base()
        if self.lora_load is not None or self.merge:
            adapter = self.open_adapter(base) if self.lora_load is not None else base
            assert adapter.contents.lora is not None
            if adapter is not base and adapter.contents.lora.is_residual:
                plain = PlainLora(adapter)
                return MergedSource(base, plain, plain.lora)
            return MergedSource(base, adapter, adapter.contents.lora)
        if self.plain:
            return PlainLora(base)
        return SharedA(base) if self.shared_a and isinstance(base, PeftReader) else base


def find_architecture(
    model: ModelArgs, shape: ShapeArgs, *, load: str | None, tokenizer: str | None, noop_layers: int
) -> tuple[Qwen3Arch, str, Path | None]:
    """The architecture, where it was found, and the folder of its config.json if there is one.

    The first of these that exists: --hf-dir, --model, a config.json in --load, the arguments saved in --load, a
    config.json beside the tokenizer, the shape flags.

    Raises:
        UsageError: none of them says it.
    """
    if model.hf_dir and model.model:
        raise UsageError(f"--hf-dir {model.hf_dir} and --model {model.model} both name the model; give one")
    if model.hf_dir:
        return _from_folder(Path(model.hf_dir))
    if model.model:
        return SIZES[model.model], f"--model {model.model}", None
    options: Sequence[StoredModel] = candidates(load) if load else ()
    for home in [Path(load), *(found.home for found in options[:1])] if load else []:
        if (home / "config.json").exists():
            return _from_folder(home)
    if whole := next((found for found in options if not incomplete(found.home, found.folder)), None):
        args, where = checkpoint_args(whole)
        return arch_from_args(args, where), where, None
    if tokenizer and (Path(tokenizer) / "config.json").is_file():
        return _from_folder(Path(tokenizer))
    if (arch := arch_from_shapes(shape, noop_layers)) is not None:
        return arch, "the shape flags", None
    where = ""
    if load is not None:
        lacks = "holds no config.json and no checkpoint" if Path(load).is_dir() else "is no folder that is there"
        where = f"--load {load} {lacks}; "
    raise UsageError(
        f"{where}which model? give --hf-dir (a folder with config.json), --model, a checkpoint in --load, or all shape "
        "flags (--num-layers --hidden-size --ffn-hidden-size --num-attention-heads --padded-vocab-size ...)"
    )


def _from_folder(folder: Path) -> tuple[Qwen3Arch, str, Path]:
    path = folder / "config.json"
    return from_hf_config(read_hf_config(folder), str(path)), str(path), folder
