"""Translate flags into the parts of a model and the LoRA facts of its checkpoints."""

from __future__ import annotations

from qwen3_npu import kernels, log
from qwen3_npu.args.lora import LoraArgs
from qwen3_npu.args.pretrain import PretrainArgs
from qwen3_npu.args.rules.swapping import swapping
from qwen3_npu.checkpoint.mapping.lora import Lora
from qwen3_npu.distributed.context_parallel import ContextParallel
from qwen3_npu.distributed.tensor_parallel.products import FusedProducts, Overlap
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.model.spec import Parts


def parts_of(args: PretrainArgs, chosen: kernels.Kernels) -> Parts:
    """The parts of the layers that the flags describe."""
    context_parallel = None
    if args.parallel.context_parallel_size > 1:
        context_parallel = ContextParallel(args.parallel.context_parallel_algo, chosen)
    return Parts(
        chosen,
        overlap=_overlap(args, chosen),
        lora=args.lora,
        context_parallel=context_parallel,
        recompute_activation=args.train.recompute_activation_function,
        recompute_products=args.train.moe_zero_memory == "level0",
        hides_exchange=args.train.moe_alltoall_overlap_comm,
        swapping=swapping(args.train),
        loss_chunk=args.train.loss_chunk_size if args.train.loss_compute_mode == "chunk" else 0,
        seed=args.runtime.seed,
    )


def _overlap(args: PretrainArgs, chosen: kernels.Kernels) -> Overlap | None:
    """How communication of tensor parallelism is hidden; None if it is not."""
    wanted = args.overlap
    if wanted.asked is None or args.parallel.tensor_model_parallel_size == 1:
        return None
    fused = fused_products(wanted.asked, chosen) if wanted.is_fused else None
    how = "torch_npu's fused operations" if fused else f"products in {wanted.coc_parallel_num} pieces"
    log.info(f"{wanted.asked}: {how} hide communication of tensor parallelism")
    return Overlap(wanted.coc_parallel_num, fused, chosen.add_weight_gradient)


def fused_products(flag: str, chosen: kernels.Kernels) -> FusedProducts | None:
    """The fused operations of the chosen kernels; None if they have none.

    Raises:
        UsageError: the installed torch_npu is too old.
    """
    if chosen.attention.__module__ != "qwen3_npu.kernels.npu":
        return None
    from qwen3_npu.kernels import npu

    if reason := npu.why_no_kernel("gather_product"):
        raise UsageError(f"{flag}: {reason}; use --use-ascend-coc")
    return npu


def lora_of(args: LoraArgs, arch: Qwen3Arch) -> Lora | None:
    """The LoRA adapter that the checkpoints describe."""
    if not args.on:
        return None
    targets, layers = args.places(arch)
    start = {"is_dora": args.use_dora, "is_residual": args.lora_init == "pissa"}
    return Lora(args.lora_r, args.lora_alpha, targets, is_stabilized=args.use_rslora, layers=layers, **start)
