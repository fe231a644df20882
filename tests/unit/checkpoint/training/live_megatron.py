"""A process of megatron-core's own: loads torch_dist checkpoints into its stock GPTModel, and saves them again.

    python live_megatron.py RANK WORLD RENDEZVOUS JOB.json

The job lists {"kind", "load", "save", "dump"}: load the checkpoint folder, save it with dist_checkpointing, and dump
this rank's parameters with torch.save.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[4])]


def main(rank: int, world: int, rendezvous: str, job: str) -> None:
    from qwen3_npu.platform import select_platform

    select_platform("cpu").activate()
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(world, expert_model_parallel_size=world, expert_tensor_parallel_size=1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    for case in json.loads(Path(job).read_text()):
        model = stock_model(case["kind"], world)
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, case["load"])
        assert state["iteration"] == 1
        model.load_state_dict(state["model"])
        torch.save(dict(model.named_parameters()), f"{case['dump']}_{rank}.pt")
        Path(case["save"]).mkdir(parents=True, exist_ok=True)
        dist.barrier()
        # What megatron.training keeps besides: args, and optimizer state that is not weights.
        args = argparse.Namespace(**{k: v for k, v in vars(state["args"]).items() if k != "vocab_size"})
        args.vocab_size = case["vocab_size"]
        other = {"args": args, "iteration": 7, "checkpoint_version": 3.0}
        dist_checkpointing.save({**other, "model": model.sharded_state_dict()}, case["save"])
    dist.barrier()
    dist.destroy_process_group()


def stock_model(kind: str, world: int):
    """megatron-core's own model of this architecture, from its own specification."""
    import samples
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    arch = samples.ARCHS[kind]
    moe = {}
    if arch.is_moe:
        moe = {
            "num_moe_experts": arch.num_experts,
            "moe_ffn_hidden_size": arch.moe_intermediate_size,
            "moe_token_dispatcher_type": "alltoall",
            "expert_model_parallel_size": world,
            "expert_tensor_parallel_size": 1,
        }
    config = TransformerConfig(
        num_layers=arch.num_hidden_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.intermediate_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_key_value_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        qk_layernorm=arch.family.qk_norm,
        add_qkv_bias=arch.family.qkv_bias,
        params_dtype=torch.bfloat16,
        bf16=True,
        tensor_model_parallel_size=world,
        use_cpu_initialization=True,
        perform_initialization=False,
        **moe,
    )
    spec = get_gpt_layer_local_spec(
        num_experts=arch.num_experts or None,
        moe_grouped_gemm=False,
        qk_layernorm=arch.family.qk_norm,
        normalization="RMSNorm",
    )
    return GPTModel(
        config,
        spec,
        vocab_size=arch.vocab_size + 6,
        max_sequence_length=512,
        share_embeddings_and_output_weights=arch.tie_word_embeddings,
        position_embedding_type="rope",
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
