"""What the flags make a model and its checkpoints of."""

from __future__ import annotations

from qwen3_npu import kernels
from qwen3_npu.args.lora import LoraArgs
from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.checkpoint.mapping.lora import Lora
from qwen3_npu.distributed.context_parallel import ContextParallel
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.model.spec import Parts


def parts_of(args: PretrainArgs, chosen: kernels.Kernels) -> Parts:
    """What the flags make the layers of."""
    context_parallel = None
    if args.parallel.context_parallel_size > 1:
        context_parallel = ContextParallel(args.parallel.context_parallel_algo, chosen)
    return Parts(
        chosen,
        lora=args.lora,
        context_parallel=context_parallel,
        recompute_activation=args.train.recompute_activation_function,
        recompute_products=args.train.moe_zero_memory == "level0",
        hides_exchange=args.train.moe_alltoall_overlap_comm,
        loss_chunk=args.train.loss_chunk_size if args.train.loss_compute_mode == "chunk" else 0,
        seed=args.runtime.seed,
    )


def lora_of(args: LoraArgs, arch: Qwen3Arch) -> Lora | None:
    """What the checkpoints say of LoRA adapters."""
    if not args.on:
        return None
    targets, layers = args.places(arch)
    start = {"is_dora": args.use_dora, "is_residual": args.lora_init == "pissa"}
    return Lora(args.lora_r, args.lora_alpha, targets, is_stabilized=args.use_rslora, layers=layers, **start)
