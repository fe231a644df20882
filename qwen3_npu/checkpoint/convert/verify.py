"""Compare an output with its source, both on disk. `verify/compare.py` describes the comparison."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence

from qwen3_npu.checkpoint.convert.jobs import in_processes
from qwen3_npu.checkpoint.formats.adapters import MergedSource, PlainLora, SharedA
from qwen3_npu.checkpoint.formats.dist_read import DistReader
from qwen3_npu.checkpoint.formats.huggingface import HfReader
from qwen3_npu.checkpoint.formats.open import Opened, Sources
from qwen3_npu.checkpoint.formats.peft import PeftReader
from qwen3_npu.checkpoint.formats.torch_read import MegatronReader
from qwen3_npu.checkpoint.mapping.source import FileJob, Source, job_bytes
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
from qwen3_npu.checkpoint.verify.tensors import HfTensors, VerifySource, megatron_tensors
from qwen3_npu.progress import Progress


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
