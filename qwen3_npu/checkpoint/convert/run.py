"""Convert checkpoints. Every format is read as a `Source` and written from one, so each direction is a reader and a
writer. Only the tensors that are being written are in memory."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Collection
from pathlib import Path

import numpy as np

from qwen3_npu import log
from qwen3_npu.args.convert import HF, ConvertArgs, LegacyConvertArgs, LoraConvertArgs, TargetArgs
from qwen3_npu.checkpoint.convert.card import write_card
from qwen3_npu.checkpoint.convert.jobs import run_jobs
from qwen3_npu.checkpoint.convert.output import found_output, planned_output
from qwen3_npu.checkpoint.convert.plan import ConversionPlan, plan_conversion
from qwen3_npu.checkpoint.convert.probe import logits, probe_tokens
from qwen3_npu.checkpoint.convert.publish import ConversionOutput, MegatronOutput
from qwen3_npu.checkpoint.formats.open import open_checkpoint
from qwen3_npu.checkpoint.manifest import write_conversion
from qwen3_npu.checkpoint.mapping.source import listed
from qwen3_npu.cli import option
from qwen3_npu.errors import UsageError
from qwen3_npu.files import HASH
from qwen3_npu.lease import Lease, folder_lease
from qwen3_npu.model.arch import read_hf_config

_SHOWN = 100  # differences listed; the rest is counted


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
        try:
            output = found_output(plan, args, target, legacy, given=given)
        except UsageError as error:
            return _report([str(error)], Path(args.save_dir))
    else:
        output = _write(plan, args, target, legacy)
        if plan.merged and lora.lora_check:
            _check_merge(plan, output)
    if args.verify or args.verify_only:
        return _verify(plan, output, args)
    return 0


def _workers(args: ConvertArgs) -> int:
    return args.jobs or min(os.cpu_count() or 1, 4)


def _without_effect(args: ConvertArgs, given: Collection[str]) -> list[str]:
    """Notes on flags of the other direction, which existing scripts contain."""
    layout = {field.name for field in dataclasses.fields(TargetArgs)} | {"ckpt_format"}
    names = sorted(layout & set(given)) if args.save_model_type == HF else sorted({"max_shard_size"} & set(given))
    kind = "a Hugging Face" if args.save_model_type == HF else "a Megatron"
    return [f"{option(name)}: no effect on {kind} output" for name in names]


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
        workers=_workers(args),
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


def _check_merge(plan: ConversionPlan, output: ConversionOutput) -> None:
    """Print the largest difference between logits of the merged weights and of base and adapter side by side."""
    tokens = probe_tokens(plan.contents.arch)
    source, merged = plan.sources(), open_checkpoint(output.root)
    expected, got = logits(source, tokens), logits(merged, tokens)
    source.close()
    merged.close()
    log.info(
        f"LoRA check: logits(base + adapter) and logits(merged) differ by at most {np.abs(expected - got).max():.3g}; "
        f"the largest is {np.abs(expected).max():.3g} ({len(tokens)} tokens, {plan.dtype.torch} weights, float32 math)"
    )


def _verify(plan: ConversionPlan, output: ConversionOutput, args: ConvertArgs) -> int:
    # Only here torch is imported: a conversion without --verify starts without it.
    import torch

    from qwen3_npu.checkpoint.convert.verify import differences
    from qwen3_npu.checkpoint.verify.compare import VerifiedOutput
    from qwen3_npu.checkpoint.verify.shares import ShardSizes

    contents, layout = output.holds()
    asked = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.get(args.params_dtype or "")
    sizes = ShardSizes.of(layout) if layout else None
    written = VerifiedOutput(output.folder, contents, sizes, asked, keeps=not args.verify_only)
    found = differences(output.jobs, plan.sources, written, _workers(args))
    lines = found.lines + [f"extra file: {name}" for name in output.unexpected_files()]
    if lines:
        return _report(lines, output.folder)
    how = f", {found.converted} of them converted to another dtype" if found.converted else ""
    how += f", {found.merged} of them merged: base + adapter to the rounding of float32" if found.merged else ""
    log.info(f"verified: {output.folder} is bit for bit what the source gives ({found.compared} tensors compared{how})")
    return 0


def _report(lines: list[str], folder: Path) -> int:
    for line in lines[:_SHOWN]:
        log.warning(line)
    if len(lines) > _SHOWN:
        log.warning(f"... and {len(lines) - _SHOWN} more")
    log.warning(f"{folder} is not what the source gives: {len(lines)} differences")
    return 1
