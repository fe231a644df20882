"""Compare an output with its source, both on disk. `verify/compare.py` describes the comparison."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from qwen3_npu import log
from qwen3_npu.args.convert import MEGATRON, ConvertArgs, TargetArgs
from qwen3_npu.checkpoint.binary.safetensors import SafetensorsFile
from qwen3_npu.checkpoint.convert.jobs import in_processes, workers_of
from qwen3_npu.checkpoint.convert.output import ConversionOutput, HfOutput, MegatronOutput, PeftOutput
from qwen3_npu.checkpoint.convert.plan import ConversionPlan, kept_dtypes
from qwen3_npu.checkpoint.formats.adapters import MergedSource, PlainLora, SharedA
from qwen3_npu.checkpoint.formats.dist_read import DistReader
from qwen3_npu.checkpoint.formats.huggingface import HfReader, weight_map
from qwen3_npu.checkpoint.formats.open import Opened, Sources, open_checkpoint
from qwen3_npu.checkpoint.formats.peft import PeftReader
from qwen3_npu.checkpoint.formats.torch_read import MegatronReader
from qwen3_npu.checkpoint.mapping.source import FileJob, Source, job_bytes
from qwen3_npu.checkpoint.mapping.table import hf_shapes
from qwen3_npu.checkpoint.verify.adapters import (
    MegatronPairs,
    MergedTensors,
    PeftPairs,
    PlainTensors,
    unlike_products,
    written_scale,
)
from qwen3_npu.checkpoint.verify.compare import CompareFile, VerifiedOutput, uncovered
from qwen3_npu.checkpoint.verify.published import published_shapes
from qwen3_npu.checkpoint.verify.shares import ShardSizes
from qwen3_npu.checkpoint.verify.tensors import HfTensors, VerifySource, megatron_tensors
from qwen3_npu.errors import UsageError
from qwen3_npu.progress import Progress

_SHOWN = 100  # differences listed; the rest is counted


@dataclasses.dataclass(frozen=True)
class VerifySources:
    """Opens what a conversion reads, for --verify.

    `output`: for an adapter whose A and B were computed anew, its copies are compared with each other.
    """

    sources: Sources
    output: VerifiedOutput | None = None

    def __call__(self) -> VerifySource:
        if self.output is not None:
            return self.output.itself()
        with contextlib.closing(self.sources()) as source:  # says what there is; its files are opened anew
            return _verified(source, self.sources.lora_alpha)


def _verified(source: Opened | Source, alpha: float | None) -> VerifySource:
    if isinstance(source, HfReader):
        return HfTensors(source)
    if isinstance(source, MegatronReader | DistReader):
        return megatron_tensors(source)
    if isinstance(source, PlainLora):
        return PlainTensors(_verified(source.adapter, alpha), source.r)
    assert isinstance(source, MergedSource)  # of a PEFT adapter alone see `differences`
    base, adapter = source.base, source.adapter
    opened = _verified(base, alpha)
    if isinstance(adapter, PeftReader):
        return MergedTensors(opened, PeftPairs(adapter))
    tensors = opened if adapter is base else _verified(adapter, alpha)
    assert isinstance(adapter, MegatronReader | DistReader | PlainLora)
    return MergedTensors(opened, MegatronPairs(tensors, _scale(adapter, alpha), adapter.contents))


def _scale(adapter: MegatronReader | DistReader | PlainLora, alpha: float | None) -> float:
    """The scale of a Megatron adapter, by its files."""
    stored = adapter.adapter if isinstance(adapter, PlainLora) else adapter
    assert isinstance(stored, MegatronReader | DistReader)
    assert stored.contents.lora is not None
    return written_scale(stored.folder, stored.contents.lora, alpha)


@dataclasses.dataclass(frozen=True)
class Verified:
    """Result of --verify: differences, one line each, and the numbers of compared, converted and merged tensors."""

    lines: list[str]
    compared: int
    converted: int
    merged: int


def differences(jobs: Sequence[FileJob], sources: Sources, output: VerifiedOutput, workers: int) -> Verified:
    """The missing, extra and different tensors in the files of `jobs`."""
    opened = sources()
    own = output if isinstance(opened, SharedA) else None
    with Progress("comparing", sum(map(job_bytes, jobs)), {"bytes": "B"}) as progress:
        found = in_processes(
            CompareFile(output),
            jobs,
            VerifySources(sources, own),
            workers,
            progress=lambda count: progress.add(bytes=count),
        )
    lines = [line for job in jobs for line in found[job.name][0]]
    if not lines:
        lines = _of_all_files(opened, sources.lora_alpha, output)
    opened.close()
    compared, converted, merged = (
        sum(counts) for counts in zip(*(result[1:] for result in found.values()), strict=True)
    )
    return Verified(lines, compared, converted, merged)


def _of_all_files(source: Opened, alpha: float | None, output: VerifiedOutput) -> list[str]:
    """Differences that no single file shows: weights that are in no file, and the scale of an adapter."""
    lines = uncovered(output)
    if isinstance(source, HfReader):
        lines += [f"missing: {name}" for name in HfTensors(source).left_out(published_shapes(output.contents))]
    lora = output.contents.lora
    if lora is None:
        return lines
    written = written_scale(output.folder, lora)
    if isinstance(source, SharedA):
        pairs = MegatronPairs(output.itself(), written, output.contents)
        return lines + unlike_products(PeftPairs(source.adapter), pairs, output.contents.arch)
    assert isinstance(source, MegatronReader | DistReader | PlainLora)
    scale = _scale(source, alpha)
    return (
        lines
        if math.isclose(scale, written, rel_tol=1e-12)
        else [*lines, f"differs: the adapter is scaled by {written:g}, not {scale:g}"]
    )


def verify(plan: ConversionPlan, output: ConversionOutput, args: ConvertArgs) -> int:
    """Compare an output with the source. The exit status: 1 if they differ, else 0."""
    contents, layout = output.holds()
    asked = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.get(args.params_dtype or "")
    sizes = ShardSizes.of(layout) if layout else None
    written = VerifiedOutput(output.folder, contents, sizes, asked, keeps=not args.verify_only)
    found = differences(output.jobs, plan.sources, written, workers_of(args))
    lines = found.lines + [f"extra file: {name}" for name in output.unexpected_files()]
    if lines:
        return report(lines, output.folder)
    how = f", {found.converted} of them converted to another dtype" if found.converted else ""
    how += f", {found.merged} of them merged: base + adapter to the rounding of float32" if found.merged else ""
    log.info(f"verified: {output.folder} is bit for bit what the source gives ({found.compared} tensors compared{how})")
    return 0


def report(lines: list[str], folder: Path) -> int:
    """Log differences. The exit status."""
    for line in lines[:_SHOWN]:
        log.warning(line)
    if len(lines) > _SHOWN:
        log.warning(f"... and {len(lines) - _SHOWN} more")
    log.warning(f"{folder} is not what the source gives: {len(lines)} differences")
    return 1


def found_output(
    what: ConversionPlan, output: ConversionOutput, args: ConvertArgs, *, given: Collection[str]
) -> ConversionOutput:
    """The output that --save-dir should hold. Layout, format and dtype come from the flags, else from the folder.

    Args:
        output: what the flags describe.
        given: names of the flags on the command line.

    Raises:
        UsageError: the folder holds no such output, or it cannot be read.
    """
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
    made = what.target(layout, opened.format, dtype, lora_dtype, own=kept)
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
