"""The output of a conversion: files in a staging folder that become visible at the end, all at once."""

from __future__ import annotations

import abc
import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from qwen3_npu import log
from qwen3_npu.checkpoint.binary.dtypes import DType
from qwen3_npu.checkpoint.convert.jobs import FileRecord, remove_records
from qwen3_npu.checkpoint.convert.plan import PROMPTS
from qwen3_npu.checkpoint.folders import (
    ADAPTER_CONFIG,
    CONVERTER,
    INTEGRITY,
    TRACKER,
    clear,
    iteration_name,
    move_to_backup,
    read_tracker,
    restore_backup,
    write_integrity,
)
from qwen3_npu.checkpoint.formats.huggingface import (
    CARRIED_FILES,
    INDEX,
    WeightFile,
    carry_files,
    tensor_bytes,
    weight_map,
    write_config,
    write_weight_index,
)
from qwen3_npu.checkpoint.formats.open import WRITERS
from qwen3_npu.checkpoint.formats.peft import ADAPTER_WEIGHTS, peft_config
from qwen3_npu.checkpoint.formats.torch_read import WEIGHTS
from qwen3_npu.checkpoint.formats.torch_write import ITERATION, Target
from qwen3_npu.checkpoint.mapping.lora import Lora, peft_shapes
from qwen3_npu.checkpoint.mapping.source import Contents, FileJob
from qwen3_npu.checkpoint.mapping.table import hf_shapes
from qwen3_npu.distributed.layout import Layout
from qwen3_npu.errors import UsageError
from qwen3_npu.files import Seal, file_digest, rename, sync_folder, sync_tree, write_text
from qwen3_npu.model.arch import Qwen3Arch

HfConfig = dict[str, object] | None  # a config.json that the model came from
STAGE = ".conversion.partial"
_BESIDE_CONFIG = [name for name in CARRIED_FILES if name != "config.json"]


class ConversionOutput(abc.ABC):
    """One output in one format.

    Attributes:
        root: the folder that the user named; configuration, tokenizer and conversion.json go there.
        folder: final folder of the weights.
        stage: staging folder, where the files are written.
        jobs: one per file.
        prompts: see `plan.read_prompt_settings`; a Megatron output has them in its args.
    """

    root: Path
    folder: Path
    stage: Path
    jobs: Sequence[FileJob]
    prompts: Mapping[str, str] = MappingProxyType({})

    @abc.abstractmethod
    def facts(self) -> dict[str, object]:
        """Format, dtype and layout, for the manifest; they identify the output."""

    @abc.abstractmethod
    def holds(self) -> tuple[Contents, Layout | None]:
        """Contents and layout of a Megatron output; None for Hugging Face and PEFT."""

    @abc.abstractmethod
    def existing(self) -> str | None:
        """A message about an existing output in the way, or None."""

    def finish(self, records: Mapping[str, FileRecord]) -> None:
        """Complete the staging folder: write the common files, and last sizes and digests."""
        seals = {name: record.seal for name, record in records.items()} | self.joint_files(records)
        remove_records(self.stage)
        write_integrity(self.stage, CONVERTER, seals)

    def joint_files(self, records: Mapping[str, FileRecord]) -> dict[str, Seal]:
        """Write the common files, which depend on all other files, to the staging folder."""
        return {}

    @abc.abstractmethod
    def carry(self, source: Path, config: HfConfig) -> None:
        """Copy configuration and tokenizer files from a folder; called before `publish`."""

    @abc.abstractmethod
    def publish(self) -> None:
        """Move the finished staging folder to `folder`. An old output there is deleted afterwards."""

    @abc.abstractmethod
    def commit(self) -> None:
        """Make the output visible; the last step."""

    @abc.abstractmethod
    def unexpected_files(self) -> list[str]:
        """Files in `folder` that a reader would take for a part of the output but that no job makes."""

    def prepare(self, overwrite: bool) -> None:
        """Raises: UsageError: something is in the way (without `overwrite`)."""
        if overwrite:
            shutil.rmtree(self.stage, ignore_errors=True)
        elif (what := self.existing()) is not None:
            raise UsageError(f"{what}; give --overwrite to replace it, or another --save-dir")


class MegatronOutput(ConversionOutput):
    """`<root>/iter_0000001`; the tracker file comes last."""

    def __init__(self, root: Path, target: Target, form: str) -> None:
        """
        Args:
            form: `TORCH` or `TORCH_DIST`.
        """
        self.root, self.target, self.format = root, target, form
        self.folder = root / iteration_name(ITERATION)
        self.stage = self.folder.with_name(self.folder.name + ".partial")
        self.jobs = [job for rank in target.layout.ranks() for job in WRITERS[form].jobs(target, rank)]

    def facts(self) -> dict[str, object]:
        dtypes: dict[str, object] = {"dtype": self.target.dtype.torch} if self.target.contents.base else {}
        if self.target.contents.lora:
            dtypes |= {"lora_dtype": self.target.lora_dtype.torch}
        if self.target.kept:
            dtypes["kept"] = {name: dtype.torch for name, dtype in self.target.kept.items()}
        layout = dataclasses.asdict(self.target.layout)
        return {"format": self.format, **dtypes, "contents": str(self.target.contents), "layout": layout}

    def holds(self) -> tuple[Contents, Layout | None]:
        return self.target.contents, self.target.layout

    def existing(self) -> str | None:
        if (tracked := read_tracker(self.root)) is not None:
            return f"{self.root} already holds a checkpoint ({TRACKER} says {tracked})"
        return f"{self.folder} exists" if self.folder.exists() else None

    def prepare(self, overwrite: bool) -> None:
        restore_backup(self.root)
        super().prepare(overwrite)

    def joint_files(self, records: Mapping[str, FileRecord]) -> dict[str, Seal]:
        return WRITERS[self.format].finish(self.target, self.stage, [records[job.name].notes for job in self.jobs])

    def carry(self, source: Path, config: HfConfig) -> None:
        carry_files(source, self.root, _BESIDE_CONFIG)
        write_config(self.target.contents.arch, config, self.root, self.target.dtype)

    def publish(self) -> None:
        sync_tree(self.stage)
        move_to_backup(self.folder)
        rename(self.stage, self.folder)
        sync_folder(self.root)

    def commit(self) -> None:
        write_text(self.root / TRACKER, str(ITERATION))
        clear(self.root)

    def unexpected_files(self) -> list[str]:
        made = {job.name for job in self.jobs}
        paths = [*self.folder.glob(f"*/{WEIGHTS}"), *self.folder.glob("*.distcp")]
        return sorted({str(path.relative_to(self.folder)) for path in paths} - made)


class HfOutput(ConversionOutput):
    """A Hugging Face model directory; config.json comes last."""

    def __init__(
        self,
        root: Path,
        arch: Qwen3Arch,
        config: dict | None,
        dtype: DType,
        *,
        files: Mapping[str, list[str]],
        kept: Mapping[str, DType] | None = None,
    ) -> None:
        """
        Args:
            config: config.json of the source; its fields that Qwen3Arch lacks are kept.
            files: file name -> names of its tensors.
            kept: name -> dtype of the tensors that have another than `dtype`.
        """
        self.kept = dict(kept or {})
        self.root = self.folder = root
        self.stage = root / STAGE
        self.arch, self.config, self.dtype, self.files = arch, config, dtype, files
        shapes = hf_shapes(arch)
        self.total = sum(tensor_bytes(shapes, dtype, self.kept).values())
        self.jobs = [
            WeightFile(name, {n: shapes[n] for n in names}, dtype, {n: kept[n] for n in names if kept and n in kept})
            for name, names in files.items()
        ]

    def facts(self) -> dict[str, object]:
        kept = {"kept": {name: dtype.torch for name, dtype in self.kept.items()}} if self.kept else {}
        return {"format": "hf", "dtype": self.dtype.torch, **kept, "files": list(self.files)}

    def holds(self) -> tuple[Contents, Layout | None]:
        return Contents(self.arch), None

    def existing(self) -> str | None:
        return f"{self.folder} already holds weights" if self._old() else None

    def _old(self) -> list[Path]:
        return [*self.folder.glob("*.safetensors"), *self.folder.glob(INDEX)]

    def joint_files(self, records: Mapping[str, FileRecord]) -> dict[str, Seal]:
        write_weight_index(self.stage, self.files, self.total)
        index = self.stage / INDEX
        return {INDEX: Seal(index.stat().st_size, file_digest(index))} if index.is_file() else {}

    def carry(self, source: Path, config: HfConfig) -> None:
        carry_files(source, self.stage, _BESIDE_CONFIG)

    def publish(self) -> None:
        (self.folder / "config.json").unlink(missing_ok=True)  # without it, half-moved weights are no model
        move_files(self.stage, self.folder, self._old())

    def commit(self) -> None:
        write_prompt_settings(self.folder, self.prompts)
        write_config(self.arch, self.config, self.folder, self.dtype)

    def unexpected_files(self) -> list[str]:
        made = {job.name for job in self.jobs}
        found = {path.name for path in self.folder.glob("*.safetensors")} | set(weight_map(self.folder).values())
        return sorted(found - made)


class PeftOutput(ConversionOutput):
    """An adapter directory that `peft` loads; adapter_config.json comes last."""

    def __init__(
        self,
        root: Path,
        arch: Qwen3Arch,
        lora: Lora,
        dtype: DType,
        *,
        base: str | None,
        kept: Mapping[str, DType] | None = None,
    ) -> None:
        """
        Args:
            base: folder of the base model, if known, so that `peft` can load it by itself.
        """
        self.root = self.folder = root
        self.stage = root / STAGE
        self.config, self.dtype = peft_config(lora, base, arch), dtype
        if arch.is_moe and ("linear_fc1" in lora.targets) != ("linear_fc2" in lora.targets):
            log.warning(
                "vLLM needs adapters of experts on linear_fc1 and linear_fc2, not on one alone; merge it to serve it"
            )
        self.contents = Contents(arch, base=False, lora=lora)
        self.jobs = [WeightFile(ADAPTER_WEIGHTS, peft_shapes(arch, lora), dtype, dict(kept or {}))]

    def facts(self) -> dict[str, object]:
        return {"format": "peft", "dtype": self.dtype.torch, "config": self.config}

    def holds(self) -> tuple[Contents, Layout | None]:
        return self.contents, None

    def existing(self) -> str | None:
        names = [name for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG) if (self.folder / name).exists()]
        return f"{self.folder} already holds {' and '.join(names)}" if names else None

    def carry(self, source: Path, config: HfConfig) -> None:
        """Copy nothing: an adapter needs no configuration or tokenizer."""

    def publish(self) -> None:
        (self.folder / ADAPTER_CONFIG).unlink(missing_ok=True)
        move_files(self.stage, self.folder, [p for p in [self.folder / ADAPTER_WEIGHTS] if p.exists()])

    def commit(self) -> None:
        write_prompt_settings(self.folder, self.prompts)
        write_text(self.folder / ADAPTER_CONFIG, json.dumps(self.config, indent=2) + "\n")

    def unexpected_files(self) -> list[str]:
        return []


def move_files(stage: Path, folder: Path, old: Sequence[Path]) -> None:
    """Move the files of the staging folder to `folder`, then delete the `old` files there."""
    (folder / INTEGRITY).unlink(missing_ok=True)
    sync_folder(stage)
    new = sorted(stage.iterdir())  # an index sorts after the weights it names
    for path in new:
        rename(path, folder / path.name)
    for path in old:
        if path.name not in {made.name for made in new}:
            path.unlink(missing_ok=True)
    stage.rmdir()
    sync_folder(folder)


def write_prompt_settings(folder: Path, prompts: Mapping[str, str]) -> None:
    """Write the file beside the weights of a Hugging Face model or adapter. It replaces an older one."""
    if prompts:
        write_text(folder / PROMPTS, json.dumps(dict(prompts), indent=1) + "\n")
    else:
        (folder / PROMPTS).unlink(missing_ok=True)
