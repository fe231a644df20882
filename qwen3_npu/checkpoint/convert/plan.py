"""Plan a conversion: determine its sources and its output from the flags and the folders."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qwen3_npu.args.convert import HF, MEGATRON, ConvertArgs, LoraConvertArgs
from qwen3_npu.checkpoint.binary.dtypes import BY_TORCH, DType
from qwen3_npu.checkpoint.folders import CONVERSION, TORCH_DIST, StoredModel
from qwen3_npu.checkpoint.formats.adapters import MergedSource
from qwen3_npu.checkpoint.formats.dist_write import same_in_all_layers
from qwen3_npu.checkpoint.formats.open import Checkpoint, Sources, find, nothing_there
from qwen3_npu.checkpoint.formats.torch_read import checkpoint_args
from qwen3_npu.checkpoint.formats.torch_write import Target
from qwen3_npu.checkpoint.mapping.lora import Lora
from qwen3_npu.checkpoint.mapping.source import Contents, Source, is_peft_name
from qwen3_npu.cli import option
from qwen3_npu.distributed.layout import Layout
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch.megatron import unlike_family
from qwen3_npu.schema import read_record

PROMPTS = "qwen3_npu_prompts.json"
PROMPT_TYPE, THINKING, TOKENIZER = _FIELDS = ("prompt_type", "enable_thinking", "tokenizer_digest")


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """A checked conversion.

    Attributes:
        home: where the source's config.json and tokenizer files are.
        contents: tensors of the output.
        dtype, lora_dtype: of the output's weights, and of its LoRA tensors.
        kept: Hugging Face and PEFT name -> dtype of the tensors that keep another dtype.
        merged: the adapter that is merged, or None.
        facts: folder and layout of the sources, for the log, the manifest and --resume.
        prompts: how the prompts of the training were written, from the adapter or else from the model.
        trained: the args of the checkpoint that was trained last; empty for Hugging Face and PEFT.
    """

    sources: Sources
    home: Path
    contents: Contents
    dtype: DType
    lora_dtype: DType
    kept: dict[str, DType]
    merged: Lora | None
    facts: dict[str, Any]
    prompts: dict[str, str]
    trained: argparse.Namespace

    def target(self, layout: Layout, form: str, dtype: DType, lora_dtype: DType, *, own: Mapping[str, DType]) -> Target:
        """The Megatron checkpoint to write. `own`: the tensors that have another dtype."""
        kept = same_in_all_layers(dtype, lora_dtype, own, self.contents.shapes()) if form == TORCH_DIST else own
        return Target(self.contents, layout, dtype, lora_dtype, kept=kept, own=own, prompts=self.prompts)


def plan_conversion(args: ConvertArgs, lora: LoraConvertArgs) -> ConversionPlan:
    """Open the sources, check that they are complete, and choose the output.

    Raises:
        UsageError: a source cannot be read, contradicts the flags, or cannot become the requested output.
    """
    for flag, folder in (("--load-dir", args.load_dir), ("--lora-load", lora.lora_load)):
        if folder is not None and not Path(folder).is_dir():
            raise UsageError(f"{flag} {nothing_there(folder, None)}")
    sources = Sources(
        args.load_dir,
        args.load_model_type,
        args.ckpt_step,
        args.hf_cfg_dir,
        lora_load=lora.lora_load,
        lora_alpha=lora.lora_alpha,
        ignored=tuple(args.ignore_args or ()),
    )
    sources, home = sources.checked("--load-dir")
    base = sources.open_base()
    if args.model_type_hf and args.model_type_hf.replace("-", "_") != base.arch.model_type:
        raise UsageError(f"--model-type-hf {args.model_type_hf}, but the model in {args.load_dir} is {base.arch}")
    if wrong := unlike_family("add_qkv_bias", args.add_qkv_bias, base.arch.family):
        raise UsageError(f"{wrong}; drop the flag")
    base.check()
    adapter = _adapter(lora, sources, base)
    held = (adapter or base).contents.lora
    _check_flags(lora, held, lora.lora_load or args.load_dir)
    facts = {"source": _facts(base)} | ({"adapter": _facts(adapter)} if adapter else {})
    trained = getattr(adapter or base, "args", argparse.Namespace())
    for opened in (base, adapter):
        if opened is not None:
            opened.close()
    sources = _decide(args, lora, sources, base, adapter=adapter)
    with contextlib.closing(sources()) as source:
        contents = source.contents
        if lora.save_lora_to_hf:
            contents = dataclasses.replace(contents, base=False)
        dtype, lora_dtype, kept = _dtypes(source, contents, args)
    return ConversionPlan(
        sources,
        home,
        contents,
        dtype,
        lora_dtype=lora_dtype,
        kept=kept,
        merged=held if isinstance(source, MergedSource) else None,
        facts=facts,
        prompts=_prompts(sources),
        trained=trained,
    )


def _prompts(sources: Sources) -> dict[str, str]:
    folders = [find(folder) for folder in (sources.lora_load, sources.load) if folder is not None]
    return next((said for found in folders if found is not None and (said := read_prompt_settings(found))), {})


def _adapter(lora: LoraConvertArgs, sources: Sources, base: Checkpoint) -> Checkpoint | None:
    """The adapter in --lora-load. It must fit the base in --load-dir."""
    if lora.lora_load is None:
        return None
    if not base.contents.base or base.contents.lora:
        raise UsageError(f"--lora-load needs a base without LoRA in --load-dir; {sources.load} holds {base.contents}")
    adapter = sources.open_adapter(base)
    adapter.check()
    return adapter


def _check_flags(lora: LoraConvertArgs, held: Lora | None, folder: str) -> None:
    """Check the LoRA flags: they must agree with the adapter's own rank, alpha and targets."""
    given: dict[str, Any] = {
        "lora_r": lora.lora_r,
        "lora_alpha": lora.lora_alpha,
        "lora_target_modules": None if lora.lora_target_modules is None else set(lora.lora_target_modules),
        "save_lora_to_hf": lora.save_lora_to_hf or None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if held is None:
        if given:
            raise UsageError(f"{option(next(iter(given)))}: {folder} holds no LoRA tensors")
        return
    facts = {"lora_r": held.r, "lora_alpha": held.alpha, "lora_target_modules": set(held.targets)}
    for name, fact in facts.items():
        if name in given and given[name] != fact:
            said = " ".join(sorted(given[name])) if isinstance(fact, set) else given[name]
            raise UsageError(f"{option(name)} {said}, but the adapter in {folder} is {held}; drop the flag")


def _decide(
    args: ConvertArgs, lora: LoraConvertArgs, sources: Sources, base: Checkpoint, *, adapter: Checkpoint | None
) -> Sources:
    """Decide between merging, resharding and exporting."""
    to_hf = args.save_model_type == HF
    if lora.save_lora_to_hf:
        if not to_hf:
            raise UsageError("--save-lora-to-hf writes a PEFT directory; give --save-model-type hf")
        if (adapter or base).format == "peft":
            raise UsageError("--save-lora-to-hf: the adapter is a PEFT directory already")
        held = (adapter or base).contents.lora
        plain = held is not None and held.is_residual
        if adapter is None:
            return dataclasses.replace(sources, plain=plain)
        return Sources(str(sources.lora_load), lora_alpha=lora.lora_alpha, plain=plain)
    if adapter is not None:
        return sources
    if not base.contents.base:
        if to_hf:
            raise UsageError(
                f"{args.load_dir} holds an adapter only: merge it with --load-dir BASE --lora-load {args.load_dir}, or "
                f"export it with --save-lora-to-hf"
            )
        return dataclasses.replace(sources, shared_a=True)
    if base.contents.lora and (to_hf or lora.lora_r is not None):
        return dataclasses.replace(sources, merge=True)
    return sources


def _dtypes(source: Source, contents: Contents, args: ConvertArgs) -> tuple[DType, DType, dict[str, DType]]:
    """The dtypes of weights and of LoRA tensors, and the tensors with another dtype."""
    if args.params_dtype:
        return BY_TORCH[args.params_dtype], BY_TORCH[args.params_dtype], {}
    stored = source.unmerged_dtype if isinstance(source, MergedSource) else source.dtype
    return kept_dtypes(contents.shapes(), stored)


def _facts(opened: Checkpoint) -> dict[str, Any]:
    """Facts about a source: what it is, and how a later run recognizes it."""
    files = sorted(path for path in opened.folder.rglob("*") if path.is_file() and path.name != CONVERSION)
    return {
        "folder": str(opened.folder),
        "format": opened.format,
        "layout": str(opened),
        "files": {str(f.relative_to(opened.folder)): [f.stat().st_size, f.stat().st_mtime_ns] for f in files},
    }


def kept_dtypes(
    shapes: Mapping[str, tuple[int, ...]], dtype_of: Callable[[str], DType]
) -> tuple[DType, DType, dict[str, DType]]:
    """The dtype of most weights, that of most LoRA tensors, and those of the tensors that have another.

    Args:
        shapes: of every Hugging Face and PEFT tensor.
        dtype_of: the dtype of each tensor. A tensor for which it raises a `UsageError` is passed over: the error is
            raised again when the tensor is read.
    """
    found: dict[str, DType] = {}
    missing: UsageError | None = None
    for name in shapes:
        try:
            found[name] = dtype_of(name)
        except UsageError as error:
            missing = error
    numbers: dict[bool, collections.Counter[DType]] = {False: collections.Counter(), True: collections.Counter()}
    for name, dtype in found.items():
        numbers[is_peft_name(name)][dtype] += math.prod(shapes[name])
    if missing is not None and not found:
        raise missing
    weights, lora = (numbers[kind] or numbers[not kind] for kind in (False, True))
    most = {False: weights.most_common(1)[0][0], True: lora.most_common(1)[0][0]}
    kept = {name: dtype for name, dtype in found.items() if dtype is not most[is_peft_name(name)]}
    return most[False], most[True], kept


def read_prompt_settings(found: StoredModel) -> dict[str, str]:
    """How the prompts of an instruction training were written; empty if a checkpoint does not say it.

    A Megatron checkpoint has it in its args, a Hugging Face model or adapter in a file beside the weights:

        qwen3_npu_prompts.json    {"prompt_type": "qwen3", "enable_thinking": "true", "tokenizer_digest": "..."}

    Raises:
        UsageError: its file holds a value that is not understood.
    """
    if found.kind == MEGATRON:
        said = vars(checkpoint_args(found)[0])
        if not isinstance(said.get(PROMPT_TYPE), str):
            return {}
        # MindSpeed-LLM saves --enable-thinking as "true", "false" or "none" too; a bool is taken as its word.
        values = {name: said[name] for name in _FIELDS if isinstance(said.get(name), (str, bool))}
        return {name: str(value).lower() if name == THINKING else str(value) for name, value in values.items()}
    path = found.folder / PROMPTS
    if not path.exists():
        return {}
    record = read_record(path, strict=True)
    record.only(_FIELDS)
    given = {name: record.text(name) for name in record.fields if name != PROMPT_TYPE}
    return {PROMPT_TYPE: record.text(PROMPT_TYPE), **given}
