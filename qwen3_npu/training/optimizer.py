"""megatron's optimizer over torch's AdamW, and its learning-rate schedule."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from qwen3_npu.args.training import OptimizerArgs, TrainArgs
from qwen3_npu.checkpoint.training.optimizer_state import main_parameters, parts
from qwen3_npu.training.muon.matrices import layer_matrix
from qwen3_npu.training.muon.optimizer import MuonAdamW
from qwen3_npu.training.muon.shares import divided, undivided
from qwen3_npu.training.update.halves import HalvedState
from qwen3_npu.training.update.slices import MOMENTS
from qwen3_npu.training.update.swap import SwappedState

_SLICES = 16  # of a step with --reuse-fp32-param; one of them has float32 masters


def wrap_model(
    config: TransformerConfig, chunks: Sequence[torch.nn.Module], args: OptimizerArgs
) -> list[DistributedDataParallel]:
    """Model chunks with bf16 conversion at their boundaries and gradient buffers reduced over data-parallel ranks."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
        use_distributed_optimizer=args.use_distributed_optimizer,
    )
    modules = [Float16Module(config, chunk) if config.bf16 else chunk for chunk in chunks]
    # Only the first chunk's communication has something to overlap with.
    return [DistributedDataParallel(config, ddp, m, disable_bucketing=i > 0) for i, m in enumerate(modules)]


def build_optimizer(chunks: Sequence[DistributedDataParallel], args: OptimizerArgs, *, bf16: bool) -> MegatronOptimizer:
    """AdamW (and Muon) with float32 state; weight decay of matrices only. The state is allocated at once."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=args.lr,
        min_lr=args.min_lr,
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_eps=args.adam_eps,
        clip_grad=args.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=args.use_distributed_optimizer,
        overlap_param_gather=args.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(config, list(chunks))
    is_sliced = args.swap_optimizer or args.reuse_fp32_param
    for part in parts(optimizer):
        if args.optimizer == "muon":
            _use_muon(part, chunks, args, config.params_dtype)
        if bf16:
            part._copy_main_params_to_model_params = functools.partial(_copy_to_model, part)
        for group in part.optimizer.param_groups:
            group["fused"] = True  # one pass over each tensor instead of a dozen
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                # Made here, not in the first step: too little memory shows at once.
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                moments = MOMENTS[:1] if parameter in vars(part.optimizer).get("matrices", ()) else MOMENTS
                for key in moments if not is_sliced else ():
                    state[key] = torch.zeros_like(parameter, dtype=torch.float32)
        if is_sliced:
            assert isinstance(part, DistributedOptimizer)
            if args.swap_optimizer:
                SwappedState(part, args.swap_optimizer_times)
            else:
                HalvedState(part, _SLICES)
    return optimizer


def _use_muon(
    part: MegatronOptimizer, chunks: Sequence[DistributedDataParallel], args: OptimizerArgs, dtype: torch.dtype
) -> None:
    """Muon for the matrices among the parameters that this part updates."""
    config, mains, matrices = chunks[0].config, dict(main_parameters(part)), {}
    for name, parameter in (named for chunk in chunks for named in chunk.named_parameters()):
        if parameter.requires_grad:
            found = layer_matrix(name, parameter, config, split_qkv=args.muon_split_qkv)
            matrices.update({} if found is None else {parameter: found})
    by_main = {main: matrices[parameter] for parameter, main in mains.items() if parameter in matrices}
    work = divided(part, matrices, mains) if isinstance(part, DistributedOptimizer) else undivided(by_main)
    MuonAdamW.adopt(part.optimizer, by_main, work, args=args, dtype=dtype)
    if isinstance(part, DistributedOptimizer):
        vars(part)["_get_main_param_and_optimizer_states"] = functools.partial(_state_of, part)


def _state_of(part: DistributedOptimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Replacement of megatron's method, which returns both moments; a matrix of Muon has no second one."""
    state = DistributedOptimizer._get_main_param_and_optimizer_states(part, parameter)
    nothing = torch.zeros((), device=state["param"].device).expand(state["param"].shape)
    return {MOMENTS[1]: nothing, **state}


def _copy_to_model(part: MegatronOptimizer) -> None:
    """Copy float32 masters to the model's weights: replaces megatron's method by one operation for all tensors."""
    if part.is_stub_optimizer:
        return
    if not isinstance(part, DistributedOptimizer):
        torch._foreach_copy_(*part._get_model_and_main_params_data_float16())
        return
    masters = itertools.chain(*part.shard_fp32_from_float16_groups, *part.shard_fp32_groups)
    weights = itertools.chain(*part.model_float16_groups, *part.model_fp32_groups)
    slices, sources = [], list(masters)
    for weight in weights:
        place = part._get_model_param_range_map(weight)["gbuf_world_in_bucket"]
        buffer, _, bucket = part.model_param_gbuf_map[weight]
        slices.append(part.buffers[buffer].buckets[bucket].param_data.view(-1)[place.start : place.end])
    if sources:
        torch._foreach_copy_(slices, sources)


def build_scheduler(
    optimizer: MegatronOptimizer, args: OptimizerArgs, train: TrainArgs, global_batch: int
) -> OptimizerParamScheduler:
    """Learning rate by samples seen, as Megatron counts; the flags count steps, or samples with --train-samples."""
    steps = args.lr_decay_iters or train.steps
    decay = args.lr_decay_samples or max(steps, 1) * global_batch
    warmup: float = args.lr_warmup_iters * global_batch or args.lr_warmup_samples
    if args.lr_warmup_fraction is not None:
        fraction = args.lr_warmup_fraction
        warmup = fraction * args.lr_decay_samples if args.lr_decay_samples else fraction * steps * global_batch
    return OptimizerParamScheduler(
        optimizer,
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr,
        # The schedule must be longer than its warm-up, also when a test trains for one step.
        lr_warmup_steps=min(warmup, decay - 1),
        lr_decay_steps=decay,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=train.steps * global_batch,
        wd_incr_style="constant",
        wsd_decay_steps=args.lr_wsd_decay_iters * global_batch if args.lr_wsd_decay_iters else None,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
        # A checkpoint holds the position of the schedule; the flags define the schedule.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
