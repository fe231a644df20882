"""Find out what a folder holds, and open it as a `Source`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from qwen3_npu.args.convert import HF, MEGATRON
from qwen3_npu.args.model import ModelArgs, ShapeArgs, arch_from_shapes
from qwen3_npu.checkpoint.formats.adapters import MergedSource, SharedA
from qwen3_npu.checkpoint.formats.dist_read import DistReader
from qwen3_npu.checkpoint.formats.folders import TORCH_DIST, checkpoint_folder, format_of, read_tracker
from qwen3_npu.checkpoint.formats.huggingface import HfReader, is_hf_weights, open_hf
from qwen3_npu.checkpoint.formats.megatron_args import arch_from_args
from qwen3_npu.checkpoint.formats.peft import PeftReader, is_peft
from qwen3_npu.checkpoint.formats.torch_read import MegatronReader, checkpoint_args
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch, from_hf_config, read_hf_config
from qwen3_npu.model.sizes import SIZES

Checkpoint = HfReader | PeftReader | MegatronReader | DistReader
Opened = Checkpoint | MergedSource | SharedA


def open_checkpoint(
    folder: str | Path,
    *,
    kind: str | None = None,
    iteration: int | None = None,
    hf_config: str | Path | None = None,
    lora_alpha: float | None = None,
    arch: Qwen3Arch | None = None,
) -> Checkpoint:
    """Whatever lies in a folder: a Hugging Face model, a PEFT adapter, or a Megatron checkpoint in either format.

    Args:
        kind: what the user says it is, `HF` or `MEGATRON`; None: to be found out.
        iteration: of a Megatron checkpoint; the tracker's if None.
        hf_config: folder of the config.json that says the architecture, if the folder does not (rightly).
        lora_alpha: of an adapter whose checkpoint does not say it.
        arch: the architecture of a PEFT adapter's base, if it is known.

    Raises:
        UsageError: there is nothing of the kind, or it is not whole.
    """
    folder = Path(folder)
    is_hf = is_peft(folder) or is_hf_weights(folder)
    is_megatron = read_tracker(folder) is not None or format_of(folder) is not None
    if kind == HF and is_megatron and not is_hf:
        raise UsageError(f"{folder} holds a Megatron checkpoint; give --load-model-type mg")
    if kind == MEGATRON and is_hf and not is_megatron:
        raise UsageError(f"{folder} holds a Hugging Face {_model_or_adapter(folder)}; give --load-model-type hf")
    if is_peft(folder) and kind != MEGATRON:
        return PeftReader(folder, arch or _peft_architecture(folder, hf_config))
    if kind == HF or (kind is None and not is_megatron):
        return open_hf(folder)
    if format_of(checkpoint_folder(folder, iteration)) == TORCH_DIST:
        return DistReader(folder, iteration, hf_config, lora_alpha)
    return MegatronReader(folder, iteration, hf_config, lora_alpha=lora_alpha)


def _model_or_adapter(folder: Path) -> str:
    return "adapter" if is_peft(folder) else "model"


def _peft_architecture(folder: Path, hf_config: str | Path | None) -> Qwen3Arch:
    if hf_config is None:
        raise UsageError(f"{folder} is a PEFT adapter; give the folder of its model's config.json with --hf-cfg-dir")
    return from_hf_config(read_hf_config(hf_config), str(Path(hf_config) / "config.json"))


@dataclasses.dataclass(frozen=True)
class Sources:
    """What a conversion reads, and how; every worker process opens it for itself.

    Attributes:
        load, kind: model or adapter, and what the user says it is.
        lora_load: adapter to merge into it.
        merge: merge the adapter that is in `load` itself.
        shared_a: give a PEFT adapter the form of a Megatron one.
    """

    load: str
    kind: str | None = None
    iteration: int | None = None
    hf_config: str | None = None
    lora_load: str | None = None
    lora_alpha: float | None = None
    merge: bool = False
    shared_a: bool = False

    def open_base(self) -> Checkpoint:
        return open_checkpoint(
            self.load,
            kind=self.kind,
            iteration=self.iteration,
            hf_config=self.hf_config,
            lora_alpha=self.lora_alpha,
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
        return _from_folder(model.hf_dir)
    if model.model:
        return SIZES[model.model], f"--model {model.model}", None
    if load and (Path(load) / "config.json").is_file():
        return _from_folder(load)
    if load and read_tracker(Path(load)) is not None:
        args, where = checkpoint_args(load)
        return arch_from_args(args, where), where, None
    if tokenizer and (Path(tokenizer) / "config.json").is_file():
        return _from_folder(tokenizer)
    if (arch := arch_from_shapes(shape, noop_layers)) is not None:
        return arch, "the shape flags", None
    raise UsageError(
        "which model? give --hf-dir (a folder with config.json), --model, a checkpoint in --load, or all shape flags "
        "(--num-layers --hidden-size --ffn-hidden-size --num-attention-heads --padded-vocab-size ...)"
    )


def _from_folder(folder: str) -> tuple[Qwen3Arch, str, Path]:
    path = Path(folder) / "config.json"
    return from_hf_config(read_hf_config(folder), str(path)), str(path), Path(folder)
