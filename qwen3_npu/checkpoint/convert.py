"""Convert checkpoints. Every format answers as a `Source` and is written from one, so every direction is a reader and a
writer put together; nothing is held in memory but the tensors being written."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

from qwen3_npu import log
from qwen3_npu.args.convert import HF, ConvertArgs, LegacyConvertArgs, TargetArgs
from qwen3_npu.checkpoint.hf_files import CARRIED_FILES, carry_files, is_hf_weights, open_hf
from qwen3_npu.checkpoint.mg_files import MegatronReader
from qwen3_npu.checkpoint.source import Source
from qwen3_npu.checkpoint.tensors import BY_TORCH
from qwen3_npu.checkpoint.weights import EMBEDDING
from qwen3_npu.checkpoint.write_hf import write_config, write_hf_weights
from qwen3_npu.checkpoint.write_mg import ITERATION, write_megatron, write_tracker
from qwen3_npu.distributed.layout import Layout, plan
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch, read_hf_config
from qwen3_npu.numbers import number_list


def convert(args: ConvertArgs, target: TargetArgs, legacy: LegacyConvertArgs) -> Path:
    """Do what the command line says; the folder written.

    Raises:
        UsageError: the source cannot be read, or the target is impossible or exists already.
    """
    open_source = _opener(args)
    source = open_source()
    arch, dtype = source.arch, source.dtype(EMBEDDING.hf[0])
    if args.model_type_hf and (args.model_type_hf == "qwen3-moe") != arch.is_moe:
        raise UsageError(f"--model-type-hf {args.model_type_hf}, but the model in {args.load_dir} is {arch}")
    log.info(f"model:  {arch}")
    log.info(f"source: {args.load_dir}" + (f" ({source.layout})" if isinstance(source, MegatronReader) else ""))
    if isinstance(source, MegatronReader):
        source.check()
    source.close()
    dtype = BY_TORCH[args.params_dtype] if args.params_dtype else dtype
    options = {"workers": args.jobs or min(os.cpu_count() or 1, 4), "resume": args.resume, "overwrite": args.overwrite}
    if args.save_model_type == HF:
        folder = _hf_folder(args, legacy)
        log.info(f"target: {folder} (Hugging Face, {dtype.torch})")
        write_hf_weights(open_source, arch, folder, dtype, int(args.max_shard_size * 1e9), **options)
    else:
        folder, layout = Path(args.save_dir), target_layout(arch, target)
        log.info(f"target: {folder} ({layout}, {dtype.torch})")
        write_megatron(open_source, arch, folder, layout, dtype, **options)
    _carry(args, arch, folder, dtype)
    if args.save_model_type != HF:
        write_tracker(folder, str(ITERATION))
    log.info(f"written: {folder}")
    return folder


def _opener(args: ConvertArgs) -> Callable[[], Source]:
    """Opens the source that the flags name; can be sent to another process."""
    if not Path(args.load_dir).is_dir():
        raise UsageError(f"--load-dir {args.load_dir} is not a directory")
    if args.load_model_type == HF:
        return functools.partial(open_hf, args.load_dir)
    return functools.partial(MegatronReader, args.load_dir, args.ckpt_step, args.hf_cfg_dir)


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


def _hf_folder(args: ConvertArgs, legacy: LegacyConvertArgs) -> Path:
    """2.1.0 takes the original model's folder as --save-dir and writes mg2hf/ inside; its successor writes there."""
    folder = Path(args.save_dir)
    return folder / "mg2hf" if legacy.is_v1 or (is_hf_weights(folder) and not args.overwrite) else folder


def _carry(args: ConvertArgs, arch: Qwen3Arch, folder: Path, dtype) -> None:
    """Configuration and tokenizer files, from where the user says or from the source."""
    source = Path(args.hf_cfg_dir or args.load_dir)
    if folder.name == "mg2hf" and not args.hf_cfg_dir and (folder.parent / "config.json").is_file():
        source = folder.parent
    carry_files(source, folder, [name for name in CARRIED_FILES if name != "config.json"])
    write_config(arch, read_hf_config(source) if (source / "config.json").is_file() else None, folder, dtype)
