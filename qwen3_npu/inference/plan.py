"""The plan of a run, from flags, config.json and the number of processes. Made before torch is imported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from qwen3_npu.args.inference import PromptArgs, WeightArgs
from qwen3_npu.args.model import ModelArgs, ShapeArgs, positions_note, shaped
from qwen3_npu.args.parallel import ParallelArgs, make_layout
from qwen3_npu.checkpoint.folders import PEFT
from qwen3_npu.checkpoint.formats.open import find, find_architecture, nothing_there
from qwen3_npu.data.text.tokenizer import TokenizerFolder, open_tokenizer
from qwen3_npu.distributed.layout import Layout, check_world_size
from qwen3_npu.errors import UsageError
from qwen3_npu.inference.generation_config import GenerationConfig, read_generation_config
from qwen3_npu.inference.taught import read_taught, settle
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.numbers import number_list
from qwen3_npu.plan.device import find_device
from qwen3_npu.plan.launch import DEFAULT
from qwen3_npu.plan.requests import in_words, request_memory, setup_of_inference
from qwen3_npu.plan.shape import shape_of


@dataclasses.dataclass(frozen=True)
class InferencePlan:
    """A checked run of a model.

    Attributes:
        parallel: the parallel flags without those of trainings.
        data_parallel: number of copies of the model.
        positions: length of the longest sequence.
        eos: tokens that end an answer.
        notes: flags that are changed, and why.
        prompts: the flags of prompts, completed from the checkpoint.
        generation: content of generation_config.json.
    """

    arch: Qwen3Arch
    found_in: str
    layout: Layout
    parallel: ParallelArgs
    data_parallel: int
    positions: int
    tokenizer: TokenizerFolder
    eos: tuple[int, ...]
    notes: tuple[str, ...]
    prompts: PromptArgs = PromptArgs()
    generation: GenerationConfig = GenerationConfig()

    def describe(self, weights: WeightArgs) -> list[str]:
        """Lines about the model that will be loaded."""
        adapter = f" with the adapter {weights.lora_load}" if weights.lora_load else ""
        copies = f", {self.data_parallel} copies" if self.data_parallel > 1 else ""
        return [
            f"model: {self.arch} (from {self.found_in})",
            f"weights: {weights.load}{adapter}, {'bfloat16' if weights.bf16 else 'float32'}",
            f"layout: {self.layout}{copies}",
            *self.notes,
        ]

    def memory_in_words(self, *, bf16: bool) -> str:
        """What a device of the usual kind holds, a line."""
        device, shape = find_device(DEFAULT), shape_of(self.arch, self.layout.padded_vocab_size)
        setup = setup_of_inference(self.layout, bf16=bf16, copies=self.data_parallel)
        return in_words(request_memory(shape, setup, device, self.positions), device)


def plan_inference(
    model: ModelArgs,
    shape: ShapeArgs,
    parallel: ParallelArgs,
    weights: WeightArgs,
    *,
    prompts: PromptArgs,
    world_size: int,
    scores: bool = False,
) -> InferencePlan:
    """Make the plan from flags, config.json and the number of processes.

    Args:
        scores: the model is a reward model, whatever the config.json of its base says.

    Raises:
        UsageError: something does not fit or is missing.
    """
    load = Path(weights.load)
    there = find(load, weights.ckpt_step)
    if there is None:
        raise UsageError(f"--load {nothing_there(load, None)}")
    if there.format == PEFT:
        raise UsageError(f"--load {load} is a PEFT adapter; give its model with --load and this with --lora-load")
    if weights.lora_load is not None and find(weights.lora_load) is None:
        raise UsageError(f"--lora-load {nothing_there(weights.lora_load, None)}")
    noop = len(number_list(parallel.noop_layers))
    tokenizer_path = prompts.tokenizer_name_or_path
    arch, found_in, config = find_architecture(
        model, shape, load=weights.load, tokenizer=tokenizer_path, noop_layers=noop
    )
    found, arch = arch, shaped(shape, arch, noop)
    if arch.reward and not scores:
        raise UsageError(f"{found_in} is a reward model's: it gives rewards (inference.py --task score), no text")
    arch = arch.as_reward() if scores else arch
    parallel, notes = _without_training(parallel)
    notes += positions_note(arch, found)
    layout = make_layout(arch, parallel, shape.make_vocab_size_divisible_by, shape.padded_vocab_size)
    check_world_size(layout, world_size)
    tokenizer = open_tokenizer(_tokenizer(tokenizer_path, there.home, config))
    if tokenizer.largest_id >= arch.vocab_size:
        raise UsageError(
            f"{tokenizer.path} has tokens up to {tokenizer.largest_id}, but the model has only {arch.vocab_size}; give "
            "the model's own tokenizer with --tokenizer-name-or-path"
        )
    generation = read_generation_config([there.home, *([config] if config else []), tokenizer.path])
    prompts, lines = settle(prompts, read_taught(weights), tokenizer)
    return InferencePlan(
        arch=arch,
        found_in=found_in,
        layout=layout,
        parallel=parallel,
        data_parallel=world_size // (layout.tensor * layout.pipeline),
        positions=shape.max_position_embeddings or arch.max_position_embeddings,
        tokenizer=tokenizer,
        eos=_eos(arch, tokenizer, generation),
        notes=(*notes, *lines),
        prompts=prompts,
        generation=generation,
    )


def _without_training(parallel: ParallelArgs) -> tuple[ParallelArgs, list[str]]:
    if parallel.context_parallel_size > 1:
        raise UsageError(
            f"--context-parallel-size {parallel.context_parallel_size} is for training; "
            f"use --tensor-model-parallel-size or --pipeline-model-parallel-size"
        )
    notes = []
    if parallel.sequence_parallel:
        notes.append("--sequence-parallel: no effect here: a step has a few tokens only")
    if parallel.num_layers_per_virtual_pipeline_stage:
        notes.append("--num-layers-per-virtual-pipeline-stage: no effect here: each stage is one chunk")
    return dataclasses.replace(parallel, sequence_parallel=False, num_layers_per_virtual_pipeline_stage=None), notes


def _tokenizer(given: str | None, load: Path, config: Path | None) -> str:
    if given is not None:
        if not (Path(given) / "tokenizer.json").is_file():
            raise UsageError(
                f"--tokenizer-name-or-path {given} holds no tokenizer.json; give the folder of a downloaded Qwen3 model"
            )
        return given
    for folder in (load, config):
        if folder is not None and (folder / "tokenizer.json").is_file():
            return str(folder)
    raise UsageError(f"{load} holds no tokenizer.json; give the tokenizer's folder with --tokenizer-name-or-path")


def _eos(arch: Qwen3Arch, tokenizer: TokenizerFolder, generation: GenerationConfig) -> tuple[int, ...]:
    """All ending tokens of generation_config.json, config.json and the tokenizer."""
    named = [*arch.eos_token_ids, *generation.ends, tokenizer.special.get(tokenizer.named("eos_token") or "")]
    return tuple(sorted({token for token in named if token is not None}))
