"""Closed forms against real models on the CPU: torch counts, the plan must say the same."""

from __future__ import annotations

import dataclasses

import pytest

import saved
from qwen3_npu.plan.activations import TORCH, layer_bytes
from qwen3_npu.plan.memory import layer_activations, static_bytes
from qwen3_npu.plan.setup import Setup
from qwen3_npu.plan.shape import shape_of


@pytest.mark.parametrize("case", saved.CASES)
@pytest.mark.usefixtures("process")
def test_a_layer_keeps_what_is_planned_to_the_byte(case: str) -> None:
    kind = saved.CASES[case][0]
    shape, setup = shape_of(saved.model(kind)), saved.setup(case)
    planned = layer_bytes(shape, setup, shape.is_moe, TORCH)
    if setup.recompute:
        one = dataclasses.replace(shape, num_layers=1)
        recomputed, _ = layer_activations(one, dataclasses.replace(setup, num_microbatches=1), 0, TORCH)
        planned = recomputed
    assert saved.layer_saved(case, "cpu", "torch") == planned


@pytest.mark.parametrize(
    "kind", ["untied", "tied", "moe", "qwen2", "untied, LoRA", "moe, LoRA", "qwen2, Muon", "moe, Muon"]
)
@pytest.mark.usefixtures("process")
def test_weights_gradients_and_optimizer_state_are_those_planned_to_the_byte(kind: str) -> None:
    from qwen3_npu import kernels
    from qwen3_npu.args.lora import LoraArgs
    from qwen3_npu.args.parallel import ParallelArgs, RuntimeArgs, make_layout
    from qwen3_npu.args.training import OptimizerArgs, TrainArgs
    from qwen3_npu.checkpoint.training.optimizer_state import parts
    from qwen3_npu.distributed.launch import model_parallel
    from qwen3_npu.model.build import build_model
    from qwen3_npu.model.config import transformer_config
    from qwen3_npu.model.spec import Parts
    from qwen3_npu.training.optimizer import build_optimizer, wrap_model

    name, _, adapted = kind.partition(", ")
    arch = dataclasses.replace(saved.model(name), num_hidden_layers=2)
    lora = LoraArgs(lora_r=4) if adapted == "LoRA" else LoraArgs()
    args = OptimizerArgs(lr=1.0, optimizer="muon" if adapted == "Muon" else "adam")
    parallel = ParallelArgs()
    layout = make_layout(arch, parallel)
    with model_parallel(layout, parallel, RuntimeArgs()):
        config = transformer_config(
            arch, layout, parallel, TrainArgs(train_iters=1, bf16=True), overlaps_p2p_safely=False
        )
        chunks = build_model(arch, config, layout, Parts(kernels.select_kernels("torch"), lora=lora))
        wrapped = wrap_model(config, chunks, args)
        optimizer = build_optimizer(wrapped, args, bf16=True)
        weights = sum(p.nbytes for chunk in chunks for p in chunk.parameters())
        buffers = [buffer for chunk in wrapped for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]
        gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
        state = 0
        for part in parts(optimizer):
            for master, moments in part.optimizer.state.items():
                state += master.nbytes + sum(m.nbytes for m in moments.values() if m.dim())
    shape = shape_of(arch, layout.padded_vocab_size)
    setup = Setup(layers=((2,),), seq_length=32, lora_rank=4 if lora.on else 0, muon=adapted == "Muon")
    assert (weights, gradients, state) == static_bytes(shape, setup, 0)
