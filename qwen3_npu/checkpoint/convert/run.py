"""Convert checkpoints. Every format is read as a `Source` and written from one, so each direction is a reader and a
writer. Only the tensors that are being written are in memory."""

from __future__ import annotations

import collections
import dataclasses
import json
import platform
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_npu import __version__, log
from qwen3_npu.args.convert import HF, ConvertArgs, LegacyConvertArgs, LoraConvertArgs, TargetArgs
from qwen3_npu.checkpoint.convert.card import write_card
from qwen3_npu.checkpoint.convert.jobs import run_jobs, workers_of
from qwen3_npu.checkpoint.convert.output import ConversionOutput, HfOutput, MegatronOutput, PeftOutput
from qwen3_npu.checkpoint.convert.plan import ConversionPlan, plan_conversion
from qwen3_npu.checkpoint.convert.probe import check_merge
from qwen3_npu.checkpoint.folders import CONVERSION, format_of, is_hf_weights
from qwen3_npu.checkpoint.formats.huggingface import plan_hf_files
from qwen3_npu.checkpoint.mapping.source import listed
from qwen3_npu.cli import option
from qwen3_npu.distributed.layout import Layout, plan
from qwen3_npu.errors import UsageError
from qwen3_npu.files import HASH, write_text
from qwen3_npu.lease import Lease, folder_lease
from qwen3_npu.model.arch import Qwen3Arch, read_hf_config
from qwen3_npu.numbers import number_list


def convert(
    args: ConvertArgs,
    target: TargetArgs,
    lora: LoraConvertArgs,
    legacy: LegacyConvertArgs,
    *,
    given: Collection[str] = (),
) -> int:
    """Run the conversion that the command line describes.

    Args:
        given: names of the flags on the command line.

    Returns:
        The exit status: 1 if --verify or --verify-only found a difference, else 0.

    Raises:
        UsageError: the source cannot be read, or the target is impossible or exists already.
    """
    for note in _without_effect(args, given):
        log.info(note)
    plan = plan_conversion(args, lora)
    log.info(f"model:  {plan.contents.arch}")
    for name, facts in plan.facts.items():
        log.info(f"{name + ':':<7} {facts['folder']} ({facts['layout']})")
    if plan.merged:
        log.info(f"merge:  {plan.merged}")
    for dtype, count in collections.Counter(dtype.torch for dtype in plan.kept.values()).items():
        log.info(f"dtypes: {count} tensors stay {dtype} beside {plan.dtype.torch}")
    if args.verify_only:
        from qwen3_npu.checkpoint.convert.verify import found_output, report, verify

        try:
            output = found_output(plan, planned_output(plan, args, target, legacy, config=None), args, given=given)
        except UsageError as error:
            return report([str(error)], Path(args.save_dir))
        return verify(plan, output, args)
    output = _write(plan, args, target, legacy)
    if plan.merged and lora.lora_check:
        check_merge(plan, output.root)
    if args.verify:
        # Only here torch is imported: a conversion without --verify starts without it.
        from qwen3_npu.checkpoint.convert.verify import verify

        return verify(plan, output, args)
    return 0


def _without_effect(args: ConvertArgs, given: Collection[str]) -> list[str]:
    """Notes on flags of the other direction, which existing scripts contain."""
    layout = {field.name for field in dataclasses.fields(TargetArgs)} | {"ckpt_format"}
    names = sorted(layout & set(given)) if args.save_model_type == HF else sorted({"max_shard_size"} & set(given))
    kind = "a Hugging Face" if args.save_model_type == HF else "a Megatron"
    return [f"{option(name)}: no effect on {kind} output" for name in names]


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
        written = what.target(layout, args.ckpt_format, what.dtype, what.lora_dtype, own=what.kept)
        output = MegatronOutput(root, written, args.ckpt_format)
    output.prompts = what.prompts
    loads = [Path(folder).resolve() for folder in (args.load_dir, what.sources.load, what.sources.lora_load) if folder]
    loads += [folder.parent for folder in loads if format_of(folder)]
    if output.root.resolve() in loads:
        raise UsageError(f"--save-dir {args.save_dir} is also read from; write to another folder")
    return output


def _hf_root(root: Path, legacy: LegacyConvertArgs, replaces: bool) -> Path:
    """Folder of a Hugging Face output: --save-dir/mg2hf for commands of MindSpeed-LLM 2.1.0, else --save-dir."""
    return root / "mg2hf" if legacy.is_v1 or (is_hf_weights(root) and not replaces) else root


def _write(plan: ConversionPlan, args: ConvertArgs, target: TargetArgs, legacy: LegacyConvertArgs) -> ConversionOutput:
    """Write and commit the output. The tracker or index, which readers look for, is written last."""
    carried = _carried_from(plan, args, legacy)
    config = read_hf_config(carried) if (carried / "config.json").exists() else None
    output = planned_output(plan, args, target, legacy, config=config)
    if isinstance(output, MegatronOutput) and (names := output.target.joined()):
        log.info(
            f"dtypes: {len(names)} Megatron tensors join several dtypes and have the one that holds all exactly (the "
            f"way back gives each its own): {listed(names, 2)}"
        )
    with folder_lease(output.root, "--save-dir") as lease:
        _fill(output, plan, args, carried, config=config, lease=lease)
    return output


def _fill(
    output: ConversionOutput,
    plan: ConversionPlan,
    args: ConvertArgs,
    carried: Path,
    *,
    config: dict | None,
    lease: Lease,
) -> None:
    output.prepare(args.overwrite)
    target_facts = output.facts()
    layout = output.target.layout if isinstance(output, MegatronOutput) else ""
    kind = " ".join(str(part) for part in (target_facts["format"], layout, target_facts.get("dtype", "")) if part)
    log.info(f"target: {output.root} ({kind})")
    records = run_jobs(
        output.jobs,
        plan.sources,
        output.stage,
        plan=json.dumps({"sources": plan.facts, "merged": str(plan.merged), "target": target_facts}, indent=1),
        workers=workers_of(args),
        resume=args.resume,
        what="writing",
    )
    lease.check()
    try:
        output.finish(records)
        output.carry(carried, config)
        output.publish()
    except OSError as error:
        raise UsageError(f"{output.root} cannot be completed: {error}; --resume continues from here") from None
    place = output.folder.relative_to(output.root)
    facts: dict[str, object] = {
        **plan.facts,
        "merged": dataclasses.asdict(plan.merged) if plan.merged else None,
        "target": target_facts,
    }
    files = {str(place / name): {"bytes": r.bytes, HASH: r.tensors} for name, r in records.items()}
    write_conversion(output.root, facts, files)
    if not isinstance(output, MegatronOutput):
        write_card(
            output.root,
            f"{plan.contents.arch}: {plan.contents}",
            plan.facts,
            plan.trained,
            scores=plan.home / "results.json",
        )
    output.commit()
    log.info(f"written: {output.root}")


def _carried_from(plan: ConversionPlan, args: ConvertArgs, legacy: LegacyConvertArgs) -> Path:
    """The folder from which configuration and tokenizer files are copied: named by a flag, else the source."""
    target = Path(args.save_dir)
    if args.hf_cfg_dir is None and legacy.is_v1 and args.save_model_type == HF and (target / "config.json").is_file():
        return target
    return Path(args.hf_cfg_dir) if args.hf_cfg_dir else plan.home


def write_conversion(root: Path, facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `conversion.json`: source, target, and the digest of every tensor.

    Args:
        facts: what is known of source and target.
        files: path relative to `root` -> {"bytes", name of the hash: tensor -> digest of its bytes}.
    """
    content = {
        "versions": {"qwen3_npu": __version__, "numpy": np.__version__, "python": platform.python_version()},
        **facts,
        "files": files,
    }
    write_text(root / CONVERSION, json.dumps(content, indent=1) + "\n")
