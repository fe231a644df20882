"""The output that the flags describe, or that exists on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

from qwen3_npu.args.convert import HF, MEGATRON, ConvertArgs, LegacyConvertArgs, TargetArgs
from qwen3_npu.checkpoint.binary.dtypes import DType
from qwen3_npu.checkpoint.binary.safetensors import SafetensorsFile
from qwen3_npu.checkpoint.convert.plan import ConversionPlan, kept_dtypes, same_in_all_layers
from qwen3_npu.checkpoint.convert.publish import ConversionOutput, HfOutput, MegatronOutput, PeftOutput
from qwen3_npu.checkpoint.formats.dist_read import DistReader
from qwen3_npu.checkpoint.formats.folders import TORCH_DIST, format_of, is_hf_weights
from qwen3_npu.checkpoint.formats.huggingface import plan_hf_files, weight_map
from qwen3_npu.checkpoint.formats.open import open_checkpoint
from qwen3_npu.checkpoint.formats.torch_read import MegatronReader
from qwen3_npu.checkpoint.formats.torch_write import Target
from qwen3_npu.checkpoint.mapping.table import hf_shapes
from qwen3_npu.distributed.layout import Layout, plan
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.numbers import number_list


def target_layout(arch: Qwen3Arch, target: TargetArgs) -> Layout:
    """The layout that the target flags describe."""
    return plan(
        arch,
        tensor=target.target_tensor_parallel_size,
        pipeline=target.target_pipeline_parallel_size,
        expert=target.target_expert_parallel_size,
        expert_tensor=target.expert_tensor_parallel_size,
        layers_per_virtual_stage=target.num_layers_per_virtual_pipeline_stage,
        num_layer_list=number_list(target.num_layer_list) or None,
        noop_layers=number_list(target.noop_layers),
        vocab_divisible_by=target.make_vocab_size_divisible_by,
        padded_vocab_size=target.padded_vocab_size,
        stacked_experts=target.moe_grouped_gemm,
    )


def planned_output(
    what: ConversionPlan, args: ConvertArgs, target: TargetArgs, legacy: LegacyConvertArgs, *, config: dict | None
) -> ConversionOutput:
    """The output that will be written.

    Args:
        config: the config.json that goes with it, if there is one.

    Raises:
        UsageError: the layout is impossible, or the output would replace the source.
    """
    root = Path(args.save_dir)
    if not what.contents.base and what.contents.lora and args.save_model_type == HF:
        output: ConversionOutput = PeftOutput(
            root, what.contents.arch, what.contents.lora, what.lora_dtype, base=args.hf_cfg_dir, kept=what.kept
        )
    elif args.save_model_type == HF:
        root = _hf_root(root, legacy, args.overwrite or args.verify_only)
        files = plan_hf_files(what.contents.arch, what.dtype, int(args.max_shard_size * 1e9), what.kept)
        output = HfOutput(root, what.contents.arch, config, what.dtype, files=files, kept=what.kept)
    else:
        layout = target_layout(what.contents.arch, target)
        dtypes = what.dtype, what.lora_dtype, what.kept
        output = MegatronOutput(root, _target(what, layout, dtypes, args.ckpt_format), args.ckpt_format)
    output.prompts = what.prompts
    loads = [Path(folder).resolve() for folder in (args.load_dir, what.sources.load, what.sources.lora_load) if folder]
    loads += [folder.parent for folder in loads if format_of(folder)]
    if output.root.resolve() in loads:
        raise UsageError(f"--save-dir {args.save_dir} is also read from; write to another folder")
    return output


def _target(
    what: ConversionPlan, layout: Layout, dtypes: tuple[DType, DType, Mapping[str, DType]], form: str
) -> Target:
    """The Megatron checkpoint to write. `dtypes`: of weights, of LoRA tensors, and of the tensors with another one."""
    dtype, lora_dtype, own = dtypes
    kept = same_in_all_layers(dtype, lora_dtype, own, what.contents.shapes())[2] if form == TORCH_DIST else own
    return Target(what.contents, layout, dtype, lora_dtype, kept=kept, own=own, prompts=what.prompts)


def _hf_root(root: Path, legacy: LegacyConvertArgs, replaces: bool) -> Path:
    """Folder of a Hugging Face output: --save-dir/mg2hf for commands of MindSpeed-LLM 2.1.0, else --save-dir."""
    return root / "mg2hf" if legacy.is_v1 or (is_hf_weights(root) and not replaces) else root


def found_output(
    what: ConversionPlan, args: ConvertArgs, target: TargetArgs, legacy: LegacyConvertArgs, *, given: Collection[str]
) -> ConversionOutput:
    """The output that --save-dir should hold. Layout, format and dtype come from the flags, else from the folder.

    Args:
        given: names of the flags on the command line.

    Raises:
        UsageError: the folder holds no such output, or it cannot be read.
    """
    output = planned_output(what, args, target, legacy, config=None)
    if isinstance(output, HfOutput):
        return _found_hf(output, args)
    if isinstance(output, PeftOutput):
        return output
    assert isinstance(output, MegatronOutput)
    opened = open_checkpoint(output.root, kind=MEGATRON, hf_config=args.hf_cfg_dir, lora_alpha=what.sources.lora_alpha)
    if not isinstance(opened, (MegatronReader, DistReader)):
        raise UsageError(f"{output.root} holds no Megatron checkpoint but {opened}")
    written = output.target
    layout, dtype, lora_dtype, kept = written.layout, written.dtype, written.lora_dtype, written.own
    if not {field.name for field in dataclasses.fields(TargetArgs)} & set(given):
        layout = opened.saved_layout()
    if args.params_dtype is None:
        there = opened.contents.shapes()
        if names := {name: shape for name, shape in written.contents.shapes().items() if name in there}:
            dtype, lora_dtype, kept = kept_dtypes(names, opened.dtype)
    opened.close()
    made = _target(what, layout, (dtype, lora_dtype, kept), opened.format)
    found = MegatronOutput(output.root, made, opened.format)
    found.folder = opened.folder
    return found


def _found_hf(output: HfOutput, args: ConvertArgs) -> HfOutput:
    folder = output.folder
    headers: dict[str, SafetensorsFile] = {}
    for path in sorted(folder.glob("*.safetensors")):
        headers[path.name] = SafetensorsFile(path)
        headers[path.name].close()
    if not headers:
        raise UsageError(f"{folder} holds no .safetensors file")
    # Where the index says that each tensor is; without one, where it is. One that is nowhere is missing in the first.
    places = weight_map(folder) or {name: file for file, header in headers.items() for name in header.header}
    files: dict[str, list[str]] = {file: [] for file in (*headers, *places.values())}
    for name in hf_shapes(output.arch):
        files[places.get(name, next(iter(files)))].append(name)
    dtype, kept = output.dtype, output.kept
    if args.params_dtype is None:
        stored = {name: file.dtype(name) for file in headers.values() for name in file.header}
        names = {name: shape for name, shape in hf_shapes(output.arch).items() if name in stored}
        dtype, _, kept = kept_dtypes(names, lambda name: stored[name]) if names else (dtype, dtype, kept)
    return HfOutput(output.root, output.arch, None, dtype, files=files, kept=kept)
