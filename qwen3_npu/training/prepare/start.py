"""Checks before torch is imported: folders, the content of --load, splits. A dry run makes the same checks."""

from __future__ import annotations

import shutil
from pathlib import Path

from qwen3_npu import log
from qwen3_npu.args.convert import HF
from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.checkpoint.folders import PEFT, candidates
from qwen3_npu.checkpoint.formats.huggingface import HfReader
from qwen3_npu.checkpoint.formats.open import nothing_there, reader
from qwen3_npu.checkpoint.mapping.frozen import frozen_share, frozen_weights
from qwen3_npu.checkpoint.training.compare import check_same_model
from qwen3_npu.errors import UsageError
from qwen3_npu.files import check_writable_later, same_folder
from qwen3_npu.model.arch import Qwen3Arch, parameter_count
from qwen3_npu.progress import human


def check_start(args: PretrainArgs, arch: Qwen3Arch) -> None:
    """Rank 0 checks everything that the flags name, and writes nothing.

    Raises:
        UsageError: the training could not start, or could not save.
    """
    folders = {
        "--save": args.checkpoint.save,
        "--tensorboard-dir": args.report.tensorboard_dir,
        "--data-cache-path": args.data.data_cache_path,
        "--hf-save-dir": args.checkpoint.hf_save_dir,
    }
    for flag, folder in folders.items():
        if folder is not None:
            check_writable_later(Path(folder), flag)
    if args.checkpoint.save is not None:
        _check_room(Path(args.checkpoint.save), args, arch)
    args.trackers.check_installed()
    _check_load(args, arch)
    _check_reference(args, arch)
    if args.lora.lora_load is not None:
        _check_opens(args.lora.lora_load, None, "--lora-load", args, arch=arch)


def checkpoint_bytes(args: PretrainArgs, arch: Qwen3Arch) -> int:
    """Size of one checkpoint: weights, and for trained weights a float32 copy and two moments."""
    weights = parameter_count(arch)
    # An adapter is small beside its model.
    trained = 0 if args.lora.on else weights * (1 - frozen_share(arch, frozen_weights(arch, args.freeze)))
    saved = 0 if args.lora.lora_ckpt_filter else weights * (2 if args.train.bf16 else 4)
    return saved + int(trained) * 12 * args.checkpoint.save_optim


def _check_room(save: Path, args: PretrainArgs, arch: Qwen3Arch) -> None:
    """Raises: UsageError: not even one checkpoint fits. A dry run warns, since it may run on another machine."""
    there = next(folder for folder in (save.absolute(), *save.absolute().parents) if folder.exists())
    needed, free = checkpoint_bytes(args, arch), shutil.disk_usage(there).free
    if needed <= free:
        return
    text = (
        f"--save {save}: a checkpoint needs {human(needed, 'B')} and {human(free, 'B')} are free, "
        f"{human(needed - free, 'B')} are missing; make room, give another folder, or --no-save-optim"
    )
    if not args.runtime.dry_run:
        raise UsageError(text)
    log.warning(text)


def _check_load(args: PretrainArgs, arch: Qwen3Arch) -> None:
    load, save = args.checkpoint.load, args.checkpoint.save
    if args.data.is_preference and (load is None or args.checkpoint.from_scratch):
        drop = " and drop --from-scratch" if args.checkpoint.from_scratch else ""
        raise UsageError(f"--stage {args.data.stage} trains a given model; give it with --load{drop}")
    if load is None:
        if args.lora.on:
            raise UsageError("--lora-r trains an adapter of a given model; give it with --load")
        return
    starts = save is not None and same_folder(load, save) and not args.lora.on
    if starts and not args.checkpoint.exit_on_missing_checkpoint and not candidates(load, args.checkpoint.ckpt_step):
        return
    _check_opens(load, args.checkpoint.ckpt_step, "--load", args, arch=arch)


def _check_reference(args: PretrainArgs, arch: Qwen3Arch) -> None:
    wanted, load = args.preference, args.checkpoint.load
    step = wanted.refer_model_iter
    if wanted.ref_model is not None:
        _check_opens(wanted.ref_model, step, "--ref-model", args, arch=arch)
    elif step is not None and args.lora.on:
        raise UsageError(
            f"--refer-model-iter {step} has no effect: with LoRA the reference is the model without its adapter; give "
            f"--ref-model too, or drop it"
        )
    elif step is not None and load is not None and not candidates(load, step):
        raise UsageError(f"--refer-model-iter {step}: {load} has no such checkpoint; name another with --ref-model")


def _check_opens(folder: str, step: int | None, flag: str, args: PretrainArgs, *, arch: Qwen3Arch) -> None:
    found = next(iter(candidates(folder, step)), None)
    if found is None:
        raise UsageError(f"{flag} {nothing_there(folder, None)}")
    if found.format == PEFT and flag == "--load":
        raise UsageError(f"--load {folder} is a PEFT adapter; give its model with --load and this with --lora-load")
    if found.format == PEFT and flag == "--ref-model":
        raise UsageError(f"--ref-model {folder} is a PEFT adapter; merge it into its model with convert_ckpt.py first")
    if found.format == HF and flag == "--lora-load":
        raise UsageError(f"--lora-load {folder} is a full model; give an adapter's folder, or drop the flag")
    if not args.runtime.dry_run:
        return  # the training opens it soon, and then checks it
    opened = reader(found, lora_alpha=args.lora.lora_alpha if args.lora.on else None, arch=arch)
    try:
        check_same_model(opened.arch, arch, f"{flag} {folder}")
        if isinstance(opened, HfReader):
            opened.check()
    finally:
        opened.close()
