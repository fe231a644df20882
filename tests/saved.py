"""What real layers keep for backward, counted by torch itself, to compare plans with."""

from __future__ import annotations

import dataclasses
from typing import Any

import tiny
from qwen3_npu.args.lora import LORA_TARGETS, LoraArgs
from qwen3_npu.plan.setup import Setup

ALL = tuple(LORA_TARGETS)
BATCH, LENGTH, RANK = 2, 32, 4
_FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

# Name -> kind of model, what the plan is told beside sizes, and the training's flags.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dense": ("untied", {}, {}),
    "dense without head norms": ("qwen2", {}, {}),
    "dense: activation recomputed": (
        "untied",
        {"recompute_activation": True},
        {"recompute_activation_function": True},
    ),
    "dense: norms recomputed": ("untied", {"recompute_norm": True}, {"recompute_norm": True}),
    "dense: attention recomputed": (
        "untied",
        {"recompute_attention": True},
        {"recompute_granularity": "selective"},
    ),
    "dense: float32 residual": ("untied", {"fp32_residual": True}, {"fp32_residual_connection": True}),
    "dense: float32 residual, norms recomputed": (
        "untied",
        {"fp32_residual": True, "recompute_norm": True},
        {"fp32_residual_connection": True, "recompute_norm": True},
    ),
    "dense: packed": ("untied", {"packed": True}, {}),
    "dense: LoRA": ("untied", {"lora_rank": RANK}, {}),
    "dense: LoRA of qkv": ("untied", {"lora_rank": RANK, "lora_targets": ("linear_qkv",)}, {}),
    "dense: LoRA of fc2": ("untied", {"lora_rank": RANK, "lora_targets": ("linear_fc2",)}, {}),
    "dense: recomputed": ("untied", {"recompute": 1}, _FULL),
    "dense: attention swapped": (
        "untied",
        {"swapped": ("self_attention",)},
        {"swap_attention": True},
    ),
    "MoE": ("moe", {}, {}),
    "MoE: activation recomputed": ("moe", {"recompute_activation": True}, {"recompute_activation_function": True}),
    "MoE: first product recomputed": ("moe", {"recompute_experts": 1}, {"moe_zero_memory": "level0"}),
    "MoE: recomputed": ("moe", {"recompute_experts": 2}, {"moe_zero_memory": "level1"}),
    "MoE LoRA: norms and attention swapped, MLP recomputed": (
        "moe",
        {
            "lora_rank": RANK,
            "swapped": ("input_layernorm", "self_attention", "pre_mlp_layernorm"),
            "recompute_mlp": True,
        },
        {
            "swap_attention": True,
            "swap_modules": "input_norm,self_attention,post_attention_norm",
            "recompute_num_layers": 3,
        },
    ),
    "MoE: float32 residual": ("moe", {"fp32_residual": True}, {"fp32_residual_connection": True}),
    "MoE: packed": ("moe", {"packed": True}, {}),
    "MoE: LoRA": ("moe", {"lora_rank": RANK}, {}),
    "MoE: LoRA of fc1": ("moe", {"lora_rank": RANK, "lora_targets": ("linear_fc1",)}, {}),
}


def model(kind: str) -> Any:
    """A tiny architecture no two of whose widths are equal."""
    return tiny.arch(kind, **({"moe_intermediate_size": 48} if kind == "moe" else {}))


def setup(case: str) -> Setup:
    """The plan's setup of a case, of one layer."""
    _, told, _ = CASES[case]
    sizes = (1, BATCH * LENGTH) if told.get("packed") else (BATCH, LENGTH)
    return Setup(layers=((1,),), micro_batch=sizes[0], seq_length=sizes[1], **told)


def layer_saved(case: str, device: str, kernel: str) -> int:
    """Bytes that one more layer keeps: those of three layers less those of two."""
    return _saved(case, 3, device, kernel) - _saved(case, 2, device, kernel)


def _saved(case: str, layers: int, device: str, kernel: str) -> int:
    """Bytes of memory that autograd holds after a bf16 forward pass, weights left out."""
    import torch
    from megatron.core.transformer.module import Float16Module

    from qwen3_npu import kernels
    from qwen3_npu.args.parallel import ParallelArgs, RuntimeArgs, make_layout
    from qwen3_npu.args.rules.swapping import swapping
    from qwen3_npu.args.training import TrainArgs
    from qwen3_npu.distributed.launch import model_parallel
    from qwen3_npu.model.build import build_model
    from qwen3_npu.model.config import transformer_config
    from qwen3_npu.model.sequence import TokenSequence
    from qwen3_npu.model.spec import Parts

    kind, told, flags = CASES[case]
    arch = dataclasses.replace(model(kind), num_hidden_layers=layers)
    rows, length = (1, BATCH * LENGTH) if told.get("packed") else (BATCH, LENGTH)
    lora = LoraArgs()
    if "lora_rank" in told:
        lora = LoraArgs(lora_r=RANK, lora_target_modules=list(told.get("lora_targets", ALL)))
    parallel = ParallelArgs()
    layout = make_layout(arch, parallel)
    train = TrainArgs(train_iters=1, bf16=True, moe_router_load_balancing_type="none", **flags)
    with model_parallel(layout, parallel, RuntimeArgs()):
        config = transformer_config(arch, layout, parallel, train, overlaps_p2p_safely=False)
        parts = Parts(
            kernels.select_kernels(kernel, device),
            lora=lora,
            recompute_activation=train.recompute_activation_function,
            recompute_products=train.moe_zero_memory == "level0",
            swapping=swapping(train),
        )
        net = Float16Module(config, build_model(arch, config, layout, parts)[0])
        fixed = {t.untyped_storage().data_ptr() for t in [*net.parameters(), *net.buffers()]}
        ids = torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
        boundaries = (0, 20, length) if told.get("packed") else None
        places = [*range(20), *range(length - 20)] if boundaries else range(length)
        positions = torch.tensor([list(places)] * rows).to(device)
        held: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in fixed:
                held.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            sequence = TokenSequence(positions, boundaries, arch.rope, torch.bfloat16)
            loss = net(ids, positions, None, labels=ids, packed_seq_params=sequence)
        size = _union([tensor.untyped_storage() for tensor in held])
        del loss
        return size


def _union(storages: list[Any]) -> int:
    """Bytes of all storages, those that lie in each other (views of the simulated NPU) counted once."""
    total = end = 0
    for first, size in sorted((storage.data_ptr(), storage.nbytes()) for storage in storages):
        total += max(0, first + size - max(end, first))
        end = max(end, first + size)
    return total
