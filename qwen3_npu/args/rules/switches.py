"""Flags that do something only beside another one. Given alone they are refused, never ignored. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from qwen3_npu.args.preference import PREFERENCE_STAGES
from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.args.profile import ProfileArgs
from qwen3_npu.args.rules.swapping import swapping
from qwen3_npu.args.training import OptimizerArgs
from qwen3_npu.cli import option
from qwen3_npu.errors import UsageError

# A feature, whether it is on, and the flags that have no effect while it is off.
_SWITCHES: tuple[tuple[str, Callable[[PretrainArgs], bool], tuple[str, ...]], ...] = (
    (
        "--lora-target-modules (without it all weights are trained)",
        lambda args: args.lora.on,
        (
            "lora_alpha",
            "lora_dropout",
            "use_rslora",
            "use_dora",
            "lora_init",
            "foreign --lora-fusion",
            "foreign --lora-register-forward-hook",
        ),
    ),
    (
        "--moe-expert-capacity-factor",
        lambda args: args.train.moe_expert_capacity_factor is not None,
        ("moe_token_drop_policy",),
    ),
    (
        "--moe-router-load-balancing-type aux_loss",
        lambda args: args.train.moe_router_load_balancing_type == "aux_loss",
        ("moe_aux_loss_coeff",),
    ),
    ("--loss-compute-mode chunk", lambda args: args.train.loss_compute_mode == "chunk", ("loss_chunk_size",)),
    (
        "--lr-decay-style WSD",
        lambda args: args.optimizer.lr_decay_style == "WSD",
        ("lr_wsd_decay_iters", "lr_wsd_decay_style"),
    ),
    (
        "--save-hf-interval or --enable-mg2hf-convert",
        lambda args: bool(args.checkpoint.save_hf_interval or args.checkpoint.enable_mg2hf_convert),
        ("hf_save_dir",),
    ),
    ("--fingerprint-interval", lambda args: bool(args.report.fingerprint_interval), ("fingerprint_format",)),
    ("--spike-guard rollback", lambda args: args.spikes.spike_guard == "rollback", ("max_rollbacks",)),
    (
        "--optimizer muon",
        lambda args: args.optimizer.optimizer == "muon",
        tuple(field.name for field in dataclasses.fields(OptimizerArgs) if field.name.startswith("muon_")),
    ),
    ("--bf16", lambda args: args.train.bf16, ("reuse_fp32_param",)),
    ("--swap-optimizer", lambda args: args.optimizer.swap_optimizer, ("swap_optimizer_times",)),
    ("--swap-attention", lambda args: args.train.swap_attention, ("swap_modules",)),
    (
        "--use-ascend-coc, --use-ascend-mc2 or --tp-comm-overlap",
        lambda args: args.overlap.use_ascend_coc or args.overlap.is_fused,
        ("coc_parallel_num", "coc_mode", "foreign --coc-fused-kernel"),
    ),
    ("--manual-gc", lambda args: args.train.manual_gc, ("manual_gc_interval",)),
    (
        "--variable-seq-lengths (or --no-pad-to-seq-lengths)",
        lambda args: args.data.variable_seq_lengths,
        ("pad_to_multiple_of",),
    ),
    (
        "--profile",
        lambda args: args.profile.profile,
        tuple(field.name for field in dataclasses.fields(ProfileArgs) if field.name != "profile"),
    ),
    (
        "--save",
        lambda args: args.checkpoint.save is not None,
        ("save_interval", "save_total_limit", "async_save"),
    ),
    (
        "--load",
        lambda args: args.checkpoint.load is not None,
        ("ckpt_step", "exit_on_missing_checkpoint", "allow_changed"),
    ),
)


def _check_rollback(args: PretrainArgs) -> None:
    """Raises: UsageError: --spike-guard rollback without what it needs."""
    if args.spikes.spike_guard != "rollback":
        return
    if args.checkpoint.save is None:
        raise UsageError("--spike-guard rollback goes back to a checkpoint of this training; it needs --save")
    if not args.checkpoint.save_optim:
        raise UsageError("--spike-guard rollback needs the optimizer's state in checkpoints; drop --no-save-optim")
    if args.preference.ref_logprobs == "cache" and args.data.is_preference:
        raise UsageError("--spike-guard rollback changes which samples come; drop --ref-logprobs cache")


def _check_trained(args: PretrainArgs) -> None:
    """Raises: UsageError: flags contradict each other about the trained weights."""
    if args.freeze.on and args.lora.on:
        raise UsageError("--freeze-include, --freeze-exclude: LoRA trains its adapters only; drop the flags")
    compares = PREFERENCE_STAGES.get(args.data.stage, False)
    if args.lora.lora_init == "pissa" and compares and args.preference.ref_model is None:
        raise UsageError(
            "--lora-init pissa changes the base, so it is no reference without its adapter; give --ref-model"
        )


def _check_overlap(args: PretrainArgs) -> list[str]:
    """A note about hidden communication of tensor parallelism.

    Raises:
        UsageError: it cannot be hidden in this way.
    """
    wanted, size = args.overlap.asked, args.parallel.tensor_model_parallel_size
    if wanted is None:
        off = args.overlap.use_ascend_coc
        return ["--use-ascend-coc: off, by --coc-parallel-num 1 or --coc-mode 0 or 1"] if off else []
    if size == 1:
        return [f"{wanted}: no effect with --tensor-model-parallel-size 1, which has nothing to hide"]
    if args.overlap.is_fused and not args.parallel.sequence_parallel:
        raise UsageError(f"{wanted} needs --sequence-parallel; add it, or use --use-ascend-coc")
    if args.lora.qlora:
        raise UsageError(f"{wanted} with --qlora: products of 4-bit weights hide no communication; drop one of them")
    return []


def _check_exchange(args: PretrainArgs) -> list[str]:
    """A note about a hidden exchange of experts.

    Raises:
        UsageError: it cannot be hidden.
    """
    train = args.train
    if not train.moe_alltoall_overlap_comm:
        return []
    if train.moe_token_dispatcher_type == "allgather":
        raise UsageError(
            "--moe-alltoall-overlap-comm needs --moe-token-dispatcher-type alltoall: allgather sends all tokens to all"
        )
    if train.moe_expert_capacity_factor is not None:
        raise UsageError(
            "--moe-alltoall-overlap-comm: not with --moe-expert-capacity-factor, which drops rows; drop one of them"
        )
    if args.parallel.expert_model_parallel_size == 1:
        return ["--moe-alltoall-overlap-comm: no effect with --expert-model-parallel-size 1: nothing is exchanged"]
    return []


def _check_interleaved(args: PretrainArgs) -> list[str]:
    """What to say of interleaved passes.

    Raises:
        UsageError: they cannot be.
    """
    train, parallel, flag = args.train, args.parallel, "--moe-fb-overlap"
    if not args.overlap.moe_fb_overlap:
        return []
    if train.moe_token_dispatcher_type == "allgather":
        raise UsageError(f"{flag} needs --moe-token-dispatcher-type alltoall: allgather sends all tokens to all")
    refused = {
        "--moe-expert-capacity-factor": (
            train.moe_expert_capacity_factor is not None,
            "rows that it drops travel apart",
        ),
        "--swap-attention": (train.swap_attention, "it brings back what the next layer of one pass needs"),
        "--fingerprint-interval": (bool(args.report.fingerprint_interval), "it notes one pass after the other"),
    }
    for other, (is_on, why) in refused.items():
        if is_on:
            raise UsageError(f"{flag} with {other}: {why}; drop one of them")
    if parallel.expert_model_parallel_size == 1:
        return [f"{flag}: no effect with --expert-model-parallel-size 1: nothing is exchanged"]
    if parallel.pipeline_model_parallel_size > 1 and parallel.num_layers_per_virtual_pipeline_stage is None:
        raise UsageError(
            f"{flag} with --pipeline-model-parallel-size {parallel.pipeline_model_parallel_size} needs "
            "--num-layers-per-virtual-pipeline-stage: without virtual stages the backward pass waits for the forward "
            "pass before it; or use --moe-alltoall-overlap-comm"
        )
    return []


def check_switches(args: PretrainArgs, given: Iterable[str]) -> list[str]:
    """Check flags that need another flag. Returns notes on defaults that the user should know, one line each.

    Args:
        given: names of the flags that were on the command line, as in `cli.Parsed`.

    Raises:
        UsageError: a flag has no effect because another one is missing.
    """
    given = set(given)
    if "context_parallel_algo" in given and "context_parallel_size" not in given:
        raise UsageError(
            "--context-parallel-algo has no effect without --context-parallel-size; add it or drop the flag"
        )
    for switch, is_on, flags in _SWITCHES:
        idle = [option(name.removeprefix("foreign --")) for name in flags if name in given]
        if idle and not is_on(args):
            raise UsageError(f"{', '.join(idle)}: no effect without {switch}; add it or drop the flag")
    _check_rollback(args)
    _check_trained(args)
    said = _check_overlap(args)
    if args.lora.on and "lora_r" not in given:
        said.append(f"LoRA: --lora-r {args.lora.lora_r}, as in MindSpeed-LLM where only --lora-target-modules is given")
    if (swapped := swapping(args.train)) is not None:
        said.append(str(swapped))
    said += _check_exchange(args) + _check_interleaved(args)
    steps, warm = args.train.train_iters, args.optimizer.lr_warmup_iters
    if steps is not None and warm > steps:
        said.append(f"warning: --lr-warmup-iters {warm} is above --train-iters {steps}: --lr is never reached")
    return said
