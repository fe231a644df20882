"""The `Setup` that training flags describe."""

from __future__ import annotations

from qwen3_npu.args.preference import PREFERENCE_STAGES
from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.args.rules.fit import Fit
from qwen3_npu.args.rules.swapping import swapping
from qwen3_npu.args.training import TrainArgs
from qwen3_npu.distributed.layout import NOOP
from qwen3_npu.plan.setup import Setup


def setup_of(args: PretrainArgs, sizes: Fit) -> Setup:
    """The settings on which memory and time depend, from flags that fit."""
    layout, train, optimizer = sizes.layout, args.train, args.optimizer
    layers = tuple(tuple(sum(layer != NOOP for layer in chunk) for chunk in stage) for stage in layout.chunks)
    per_stage = [sum(len(chunk) for chunk in stage) for stage in layout.chunks]
    recompute, group = _recompute(args, per_stage, layout.virtual)
    swapped, most = swapping(train), max(per_stage)
    if swapped is not None:
        recompute = most if swapped.recomputed is None else min(most, swapped.recomputed * layout.virtual)
    return Setup(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        context=args.parallel.context_parallel_size,
        expert=layout.expert,
        expert_tensor=layout.expert_tensor,
        data=sizes.data_parallel,
        layers=layers,
        seq_length=train.seq_length,
        micro_batch=train.micro_batch_size * (2 if args.data.is_preference else 1),  # both answers of each pair
        reference=holds_reference(args),
        scored=bool(PREFERENCE_STAGES.get(args.data.stage)) and args.preference.ref_logprobs != "cache",
        num_microbatches=sizes.num_microbatches,
        sequence_parallel=args.parallel.sequence_parallel,
        ring=args.parallel.context_parallel_algo == "megatron_cp_algo",
        distributed_optimizer=optimizer.use_distributed_optimizer,
        bf16=train.bf16,
        fp32_residual=train.fp32_residual_connection,
        muon=optimizer.optimizer == "muon",
        recompute=recompute,
        recompute_group=group,
        recompute_activation=train.recompute_activation_function,
        recompute_norm=train.recompute_norm,
        recompute_attention=train.recompute_granularity == "selective" and "core_attn" in train.recompute_modules,
        packed=args.data.reset_attention_mask,
        lora_rank=args.lora.lora_r if args.lora.on else 0,
        quantized=args.lora.qlora,
        quantized_ends=args.lora.qlora_embedding,
        double_quantized=args.lora.qlora_double_quant,
        dora=args.lora.use_dora,
        pissa=args.lora.lora_init == "pissa",
        lora_targets=tuple(args.lora.lora_target_modules),
        loss_chunk=train.loss_chunk_size if train.loss_compute_mode == "chunk" else 0,
        reuse_master=optimizer.reuse_fp32_param,
        swap_optimizer=optimizer.swap_optimizer,
        swap_slices=optimizer.swap_optimizer_times,
        swapped=swapped.modules if swapped is not None else (),
        swapped_layers=min(most, (swapped.layers or most) * layout.virtual) if swapped is not None else 0,
        recompute_experts=_recomputed_experts(train),
        expert_capacity=_capacity(train),
        gathered=train.moe_token_dispatcher_type == "allgather",
        overlap_tensor=args.overlap.asked is not None,
        fused_tensor=args.overlap.is_fused,
        tensor_pieces=args.overlap.coc_parallel_num,
        overlap_grads=optimizer.overlap_grad_reduce,
        overlap_params=optimizer.overlap_param_gather,
        overlap_experts=train.moe_alltoall_overlap_comm,
        interleaved=args.overlap.moe_fb_overlap and layout.expert > 1,
    )


def _capacity(train: TrainArgs) -> float:
    """Capacity of an expert relative to its even share; a capacity above 1 drops no balanced tokens."""
    factor = train.moe_expert_capacity_factor
    if factor is None:
        return 1.0
    return factor if train.moe_pad_expert_input_to_capacity else min(1.0, factor)


def _recomputed_experts(train: TrainArgs) -> int:
    is_module = train.recompute_granularity == "selective" and "moe" in train.recompute_modules
    return 2 if is_module else {"disable": 0, "level0": 1, "level1": 2}[train.moe_zero_memory]


def holds_reference(args: PretrainArgs) -> bool:
    """Whether a frozen copy of the model is in memory while a preference stage trains."""
    wanted = args.preference
    from_file = wanted.ref_logprobs == "cache" and wanted.ref_model is None
    return (
        bool(PREFERENCE_STAGES.get(args.data.stage))
        and not from_file
        and (wanted.ref_model is not None or not args.lora.on)
    )


def _recompute(args: PretrainArgs, per_stage: list[int], virtual: int) -> tuple[int, int]:
    """Recomputed layers of a stage, and layers of one group."""
    train = args.train
    if train.recompute_granularity != "full" or train.recompute_num_layers is None:
        return 0, 1
    if train.recompute_method == "uniform":
        return max(per_stage), train.recompute_num_layers
    return min(max(per_stage), train.recompute_num_layers * virtual), 1
