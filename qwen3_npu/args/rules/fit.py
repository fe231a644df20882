"""Whether layout, batch and lengths fit a model and a number of processes. Flags and `plan` use this code."""

from __future__ import annotations

import dataclasses
import math

from qwen3_npu.args.parallel import make_layout
from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.args.training import TrainArgs
from qwen3_npu.distributed.layout import Layout, check_world_size, divisors
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch


@dataclasses.dataclass(frozen=True)
class Fit:
    """Sizes that fit each other.

    Attributes:
        data_parallel: copies of the model.
        global_batch: samples per step.
        num_microbatches: forward passes of each copy per step.
    """

    layout: Layout
    data_parallel: int
    global_batch: int
    num_microbatches: int


def fit_flags(args: PretrainArgs, arch: Qwen3Arch, world_size: int) -> Fit:
    """The sizes that follow from the flags, the model and the number of processes.

    Raises:
        UsageError: something does not fit.
    """
    layout = make_layout(arch, args.parallel, args.shape.make_vocab_size_divisible_by, args.shape.padded_vocab_size)
    context = args.parallel.context_parallel_size
    check_world_size(layout, world_size, context)
    _check_recompute(args.train, layout)
    _check_sequence(args, arch)
    _check_kind(args.train, arch)
    if args.lora.qlora:
        _check_blocks(arch, layout)
    data_parallel = world_size // (layout.tensor * layout.pipeline * context)
    micro = args.train.micro_batch_size
    args.preference.check_stage(args.data.stage)
    if args.data.stage == "kto":
        args.preference.check_kto(micro)
    global_batch = args.train.global_batch_size or micro * data_parallel
    if global_batch % (micro * data_parallel):
        raise UsageError(
            f"--global-batch-size {global_batch} is not a multiple of --micro-batch-size {micro} x {data_parallel} "
            f"data-parallel ranks"
        )
    num_microbatches = global_batch // (micro * data_parallel)
    if layout.virtual > 1 and num_microbatches % layout.pipeline:
        raise UsageError(
            f"an interleaved pipeline of {layout.pipeline} stages needs a multiple of {layout.pipeline} micro-batches "
            f"per step; --global-batch-size {global_batch} gives {num_microbatches}"
        )
    return Fit(layout, data_parallel, global_batch, num_microbatches)


def _check_sequence(args: PretrainArgs, arch: Qwen3Arch) -> None:
    seq, tp = args.train.seq_length, args.parallel.tensor_model_parallel_size
    longest = args.shape.max_position_embeddings or arch.max_position_embeddings
    if seq > longest:
        raise UsageError(
            f"--seq-length {seq} is above the model's {longest} positions; "
            f"raise --max-position-embeddings to train longer"
        )
    if arch.is_moe and tp > 1 and not args.parallel.sequence_parallel:
        raise UsageError(
            f"a MoE model at --tensor-model-parallel-size {tp} trains with --sequence-parallel only; add it"
        )
    if arch.is_moe and args.data.variable_seq_lengths and args.train.moe_token_dispatcher_type == "allgather":
        raise UsageError("--moe-token-dispatcher-type allgather needs micro-batches of one length; use alltoall")
    shares = args.parallel.expert_model_parallel_size * (args.parallel.expert_tensor_parallel_size or tp)
    # Experts are shared with ranks that compute other micro-batches.
    meets = shares > tp * args.parallel.context_parallel_size
    if args.data.variable_seq_lengths and args.train.moe_pad_expert_input_to_capacity and meets:
        raise UsageError(
            f"--moe-pad-expert-input-to-capacity with --expert-model-parallel-size "
            f"{args.parallel.expert_model_parallel_size} needs micro-batches of one length, and "
            f"--variable-seq-lengths (--no-pad-to-seq-lengths) makes them differ; drop one of the two"
        )
    multiple, why = sequence_multiple(args)
    if seq % multiple:
        raise UsageError(f"--seq-length {seq} must be a multiple of {multiple} ({why})")
    _check_context_parallel(args, arch)


def _check_recompute(train: TrainArgs, layout: Layout) -> None:
    """Megatron's groups of recomputed layers are all of one size, within a chunk of the model."""
    size, is_uniform = train.recompute_num_layers, train.recompute_method == "uniform"
    if size is None or not is_uniform or train.swap_attention:
        return
    lengths = {len(chunk) for stage in layout.chunks for chunk in stage}
    if any(length % size for length in lengths):
        held = "a pipeline stage" if layout.virtual == 1 else "a chunk of a virtual pipeline stage"
        raise UsageError(
            f"--recompute-method uniform --recompute-num-layers {size} does not divide the "
            f"{' and '.join(map(str, sorted(lengths)))} layers of {held}; use one of "
            f"{divisors(math.gcd(*lengths))}, or --recompute-method block"
        )


def _check_kind(train: TrainArgs, arch: Qwen3Arch) -> None:
    """Refuse flags for experts if the model is dense, and modules that the model lacks."""
    absent, kind = ("mlp", "MoE") if arch.is_moe else ("moe", "dense")
    if train.recompute_granularity == "selective" and absent in train.recompute_modules:
        raise UsageError(f"--recompute-modules {absent}: this model is {kind} and has no such part")
    factor = train.moe_expert_capacity_factor
    if arch.is_moe and factor and train.moe_pad_expert_input_to_capacity:
        most = arch.num_experts / arch.num_experts_per_tok
        if factor > most:
            raise UsageError(
                f"--moe-expert-capacity-factor {factor:g} with --moe-pad-expert-input-to-capacity is above {most:g}, "
                f"where an expert has room for every token; give {most:g} or less"
            )
    if not arch.is_moe:
        moe = [field for field in dataclasses.fields(train) if field.name.startswith("moe_")]
        given = [f"--{f.name.replace('_', '-')}" for f in moe if getattr(train, f.name) != f.default]
        if given:
            raise UsageError(f"{', '.join(given)}: this model is dense; drop what is for experts")


def _check_blocks(arch: Qwen3Arch, layout: Layout) -> None:
    """Check that blocks of 64 weights lie within rows of a rank, so that the codes are equal in every layout."""
    widths = {"the hidden size": (arch.hidden_size, 1)}
    widths["the width of attention"] = (arch.num_attention_heads * arch.head_dim, layout.tensor)
    if arch.is_moe:
        widths["the width of an expert"] = (arch.moe_intermediate_size, layout.expert_tensor)
    else:
        widths["the width of the MLP"] = (arch.intermediate_size, layout.tensor)
    for what, (width, ranks) in widths.items():
        if width % (64 * ranks):
            raise UsageError(
                f"--qlora: {what}, {width}, over {ranks} tensor-parallel ranks is no multiple of NF4's blocks of 64; "
                f"use fewer"
            )


def sequence_multiple(args: PretrainArgs) -> tuple[int, str]:
    """(number, reason): every sequence's length must be a multiple of the number."""
    parallel = args.parallel
    multiple, why = parallel.context_parallel_size, []
    if parallel.context_parallel_size > 1:
        if parallel.context_parallel_algo == "megatron_cp_algo":
            multiple *= 2
        why.append(f"--context-parallel-size {parallel.context_parallel_size}, {parallel.context_parallel_algo}")
    if parallel.sequence_parallel:
        multiple *= parallel.tensor_model_parallel_size
        why.append(f"--sequence-parallel over TP {parallel.tensor_model_parallel_size}")
    return multiple, " and ".join(why)


def _check_context_parallel(args: PretrainArgs, arch: Qwen3Arch) -> None:
    size, algorithm = args.parallel.context_parallel_size, args.parallel.context_parallel_algo
    if size == 1:
        return
    heads = arch.num_attention_heads // args.parallel.tensor_model_parallel_size
    if algorithm == "ulysses_cp_algo" and heads % size:
        raise UsageError(
            f"--context-parallel-size {size} with ulysses_cp_algo does not divide the {heads} query heads of a TP "
            f"rank; use megatron_cp_algo or one of {divisors(heads)}"
        )
    if algorithm == "megatron_cp_algo" and args.train.attention_dropout:
        raise UsageError("--attention-dropout is not offered with megatron_cp_algo; use ulysses_cp_algo")
