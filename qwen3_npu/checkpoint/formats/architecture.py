"""Find the model's architecture among the places that may say it."""

from __future__ import annotations

from pathlib import Path

from qwen3_npu.args.model import ModelArgs, ShapeArgs, arch_from_shapes
from qwen3_npu.checkpoint.formats.folders import read_tracker
from qwen3_npu.checkpoint.formats.megatron_args import arch_from_args
from qwen3_npu.checkpoint.formats.torch_read import checkpoint_args
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch, from_hf_config, read_hf_config
from qwen3_npu.model.sizes import SIZES


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
