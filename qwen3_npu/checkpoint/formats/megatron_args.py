"""Read the `args` namespace inside a Megatron checkpoint as architecture, layout, adapter and dtypes.

`torch_write.py` writes it; `model/arch/megatron.py` has the arguments of the architecture.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Mapping

from qwen3_npu import log
from qwen3_npu.args.lora import ALL_TARGETS, LORA_ENDS, LORA_TARGETS, FreezeArgs, LoraArgs
from qwen3_npu.args.preference import PreferenceArgs
from qwen3_npu.args.training import DataArgs, OptimizerArgs, TrainArgs
from qwen3_npu.checkpoint.binary.dtypes import BY_TORCH, DTYPES, DType
from qwen3_npu.checkpoint.mapping.lora import END_TARGETS, STACKED_TARGETS, Lora
from qwen3_npu.checkpoint.mapping.source import OWN_DTYPES, listed
from qwen3_npu.distributed.layout import Layout, plan
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.model.arch.facts import FACTS
from qwen3_npu.model.arch.megatron import from_megatron
from qwen3_npu.numbers import number_list
from qwen3_npu.schema import number, record, text

# What trainings save of their flags; a new one of these groups is known here without being listed again.
OWN_FLAGS = frozenset(
    field.name
    for group in (TrainArgs, OptimizerArgs, DataArgs, FreezeArgs, LoraArgs, PreferenceArgs)
    for field in dataclasses.fields(group)
)


def arch_from_args(args: argparse.Namespace, where: str) -> Qwen3Arch:
    """The architecture that a checkpoint's arguments describe; see `from_megatron`. `where` names the file."""
    arch = from_megatron(vars(args), where, OWN_FLAGS)
    for fact in FACTS:
        # MindSpeed-LLM's converter copies config.json's keys: one of transformers 5 has rope_theta in a dict.
        if fact.name in ("rope_theta", "rms_norm_eps") and all(getattr(args, n, None) is None for n in fact.megatron):
            log.warning_once(
                f"{where}: its args have no {fact.megatron[0]}; {getattr(arch, fact.name):g} is taken, as in Qwen3 "
                "(--hf-cfg-dir: the model's own config.json)"
            )
    return arch


def layout_from_args(
    args: argparse.Namespace,
    arch: Qwen3Arch,
    *,
    padded_vocab_size: int,
    virtual: int,
    stacked_experts: bool,
    expert_tensor: int | None = None,
) -> Layout:
    """The layout that a checkpoint's arguments describe.

    Args:
        padded_vocab_size, virtual, stacked_experts: taken from the tensors, since arguments may be wrong.
        expert_tensor: also from the tensors, if there are experts (MindSpeed-LLM's converter does not save it).
    """
    pipeline = getattr(args, "pipeline_model_parallel_size", 1)
    noop = number_list(getattr(args, "noop_layers", None))
    layer_list = number_list(getattr(args, "num_layer_list", None))
    total = arch.num_hidden_layers + len(noop)
    return plan(
        arch,
        tensor=getattr(args, "tensor_model_parallel_size", 1),
        pipeline=pipeline,
        expert=getattr(args, "expert_model_parallel_size", None) or 1,
        expert_tensor=expert_tensor or getattr(args, "expert_tensor_parallel_size", None),
        layers_per_virtual_stage=total // pipeline // virtual if virtual > 1 else None,
        num_layer_list=layer_list or None,
        noop_layers=noop,
        padded_vocab_size=padded_vocab_size,
        stacked_experts=stacked_experts,
    )


def own_dtypes(args: argparse.Namespace, names: Collection[str], where: str) -> dict[str, DType]:
    """Hugging Face (PEFT) names of tensors -> the dtype they had before they were joined with wider ones.

    Raises:
        UsageError: the argument says something else.
    """
    said = record(getattr(args, OWN_DTYPES, None) or {}, f"{where}: {OWN_DTYPES}")
    said.only([dtype.torch for dtype in DTYPES])
    found = {text(name, said.where): BY_TORCH[dtype] for dtype in said.fields for name in said.sequence(dtype)}
    if unknown := found.keys() - set(names):
        raise UsageError(f"{said.where} names {listed(unknown)}, which the model has not")
    return found


def lora_from_args(
    args: argparse.Namespace, shapes: Mapping[str, tuple[int, ...]], alpha: float | None, where: str
) -> Lora | None:
    """The adapter among Megatron tensors of these shapes, or None. Rank and targets come from the tensors' shapes.

    Args:
        alpha: used if the arguments do not say it.

    Raises:
        UsageError: alpha is said nowhere.
    """
    layers = record(getattr(args, "lora_layers", None) or {}, f"{where}: lora_layers")
    layers.only(LORA_TARGETS)
    found = found_lora(shapes, where)
    said = getattr(args, "lora_target_modules", None)
    if layers.fields or (isinstance(said, list) and set(said) & LORA_ENDS.keys()):
        # A rank does not show every target: only this project saves such adapters, whose args say it all.
        told = record(vars(args), f"{where}: args")
        names = [text(name, f"{where}: lora_target_modules") for name in told.sequence("lora_target_modules")]
        found = told.integer("lora_r", least=1), tuple(target for target in ALL_TARGETS if target in names)
    if found is None:
        return None
    saved = getattr(args, "lora_alpha", None)
    alpha = alpha if saved is None else number(saved, f"{where}: lora_alpha")
    if alpha is None:
        raise UsageError(f"{where} holds LoRA tensors but its args have no lora_alpha; give --lora-alpha")
    r, targets = found
    some = tuple((target, tuple(sorted(set(layers.counts(target))))) for target in targets if target in layers.fields)
    kinds = {
        "is_stabilized": getattr(args, "use_rslora", False) is True,
        "is_dora": getattr(args, "use_dora", False) is True,
        "is_residual": getattr(args, "lora_init", None) == "pissa",
    }
    return Lora(r, alpha, targets, layers=some, **kinds)


def found_lora(shapes: Mapping[str, tuple[int, ...]], where: str) -> tuple[int, tuple[str, ...]] | None:
    """Rank and targets of the LoRA tensors among Megatron tensors (of one rank), or None if there are none.

    Raises:
        UsageError: they have several ranks, or belong to modules that are not in `ALL_TARGETS`; `where` holds them.
    """
    ranks: set[int] = set()
    targets: set[str] = set()
    for name, shape in shapes.items():
        parts = name.split(".")
        if name.endswith(".lora_A.default.weight"):
            targets.add(END_TARGETS.get(parts[-4], parts[-4]))
            ranks.add(shape[-2])
        elif parts[-1] in ("weight1_lora_b", "weight2_lora_a"):
            targets.add(STACKED_TARGETS[parts[-1][:7]])
            ranks.add(shape[0] if parts[-1].endswith("b") else shape[1])
    if not ranks:
        return None
    if len(ranks) > 1 or not targets <= ALL_TARGETS.keys():
        raise UsageError(
            f"{where} holds LoRA tensors of ranks {sorted(ranks)} on {sorted(targets)}; one rank, and targets among "
            f"{', '.join(ALL_TARGETS)}, are supported"
        )
    return ranks.pop(), tuple(target for target in ALL_TARGETS if target in targets)
