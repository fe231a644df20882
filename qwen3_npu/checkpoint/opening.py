"""Find out what a folder holds, and open it as a `Source`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from qwen3_npu.checkpoint.dist_files import DistReader
from qwen3_npu.checkpoint.hf_files import HfReader, is_hf_weights, open_hf
from qwen3_npu.checkpoint.merge import MergedSource, SharedA
from qwen3_npu.checkpoint.mg_files import MegatronReader
from qwen3_npu.checkpoint.mg_folder import TORCH_DIST, checkpoint_folder, format_of, read_tracker
from qwen3_npu.checkpoint.peft_files import PeftReader, is_peft
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch, from_hf_config, read_hf_config

Checkpoint = HfReader | PeftReader | MegatronReader | DistReader
Opened = Checkpoint | MergedSource | SharedA


def open_checkpoint(
    folder: str | Path,
    *,
    iteration: int | None = None,
    hf_config: str | Path | None = None,
    lora_alpha: float | None = None,
    arch: Qwen3Arch | None = None,
) -> Checkpoint:
    """Whatever lies in a folder: a Hugging Face model, a PEFT adapter, or a Megatron checkpoint in either format.

    Args:
        iteration: of a Megatron checkpoint; the tracker's if None.
        hf_config: folder of the config.json that says the architecture, if the folder does not (rightly).
        lora_alpha: of an adapter whose checkpoint does not say it.
        arch: the architecture of a PEFT adapter's base, if it is known.

    Raises:
        UsageError: there is nothing of the kind, or it is not whole.
    """
    folder = Path(folder)
    if is_peft(folder):
        return PeftReader(folder, arch or _peft_architecture(folder, hf_config))
    if is_hf_weights(folder) or ((folder / "config.json").is_file() and read_tracker(folder) is None):
        return open_hf(folder)
    if format_of(checkpoint_folder(folder, iteration)) == TORCH_DIST:
        return DistReader(folder, iteration, hf_config, lora_alpha)
    return MegatronReader(folder, iteration, hf_config, lora_alpha=lora_alpha)


def _peft_architecture(folder: Path, hf_config: str | Path | None) -> Qwen3Arch:
    if hf_config is None:
        raise UsageError(f"{folder} is a PEFT adapter; give the folder of its model's config.json with --hf-cfg-dir")
    return from_hf_config(read_hf_config(hf_config), str(Path(hf_config) / "config.json"))


@dataclasses.dataclass(frozen=True)
class Sources:
    """What a conversion reads, and how; every worker process opens it for itself.

    Attributes:
        load: model or adapter.
        lora_load: adapter to merge into it.
        merge: merge the adapter that is in `load` itself.
        shared_a: give a PEFT adapter the form of a Megatron one.
    """

    load: str
    iteration: int | None = None
    hf_config: str | None = None
    lora_load: str | None = None
    lora_alpha: float | None = None
    merge: bool = False
    shared_a: bool = False

    def open_base(self) -> Checkpoint:
        return open_checkpoint(
            self.load, iteration=self.iteration, hf_config=self.hf_config, lora_alpha=self.lora_alpha
        )

    def open_adapter(self, arch: Qwen3Arch) -> Checkpoint:
        assert self.lora_load is not None
        return open_checkpoint(self.lora_load, lora_alpha=self.lora_alpha, arch=arch)

    def __call__(self) -> Opened:
        base = self.open_base()
        if self.lora_load is not None or self.merge:
            adapter = self.open_adapter(base.arch) if self.lora_load is not None else base
            assert adapter.contents.lora is not None
            return MergedSource(base, adapter, adapter.contents.lora)
        return SharedA(base) if self.shared_a and isinstance(base, PeftReader) else base
