"""What this code relies on in megatron-core, so that another version fails here and not in a training."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib.metadata import version

import pytest


def test_version() -> None:
    assert version("megatron-core") == "0.16.1"


def parameters(function: object) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_signatures() -> None:
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    wanted = {
        GPTModel.__init__: {"config", "transformer_layer_spec", "vocab_size", "share_embeddings_and_output_weights"},
        GPTModel.forward: {"input_ids", "position_ids", "labels", "packed_seq_params"},
        GPTModel.compute_language_model_loss: {"labels", "logits"},
        ColumnParallelLinear.__init__: {"gather_output", "skip_bias_add", "tp_comm_buffer_name", "tp_group"},
        RowParallelLinear.__init__: {"input_is_parallel", "skip_bias_add", "tp_comm_buffer_name", "tp_group"},
        parallel_state.initialize_model_parallel: {"expert_model_parallel_size", "expert_tensor_parallel_size"},
        DistributedDataParallel.__init__: {"disable_bucketing"},
        DistributedDataParallelConfig.__init__: {"grad_reduce_in_fp32", "use_distributed_optimizer"},
        OptimizerConfig.__init__: {"clip_grad", "adam_beta2", "overlap_param_gather"},
        get_megatron_optimizer: {"config", "model_chunks"},
        DistributedOptimizer.get_parameter_state_dp_zero: {"use_gloo_comm"},
        DistributedOptimizer.load_parameter_state_from_dp_zero: {"state_dict"},
        DistributedOptimizer._get_main_param_and_optimizer_states: {"model_param"},
        OptimizerParamScheduler.__init__: {"lr_warmup_steps", "wsd_decay_steps", "lr_wsd_decay_style"},
        TopKRouter.routing: {"logits", "padding_mask"},
        TransformerConfig.__init__: {
            "pipeline_model_parallel_layout",
            "use_te_activation_func",
            "calculate_per_token_loss",
            "deallocate_pipeline_outputs",
            "overlap_p2p_comm",
            "qk_layernorm",
        },
    }
    asked = {"forward_step_func", "data_iterator", "model", "num_microbatches", "forward_data_store", "config"}
    for function, more in (
        (schedules.combined_1f1b_schedule_for_no_pipelining, {"no_sync_func", "total_num_tokens"}),
        (schedules.combined_1f1b_schedule_for_interleaved_pipelining, {"pre_forward", "post_backward"}),
        (schedules.forward_step, {"cp_group_size", "current_microbatch", "vp_stage", "is_last_stage"}),
    ):
        wanted[function] = asked | more  # distributed/interleave.py
    for function, names in wanted.items():
        assert names <= parameters(function), function


def test_spec_fields() -> None:
    from megatron.core.transformer import TransformerLayerSubmodules
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.moe_layer import MoESubmodules

    def fields(cls: type) -> set[str]:
        return set(cls.__dataclass_fields__)

    assert {"input_layernorm", "self_attention", "self_attn_bda", "mlp"} <= fields(TransformerLayerSubmodules)
    assert {"linear_fc1", "linear_fc2", "activation_func"} <= fields(MLPSubmodules)
    assert {"experts", "router"} <= fields(MoESubmodules)


class TestTraps:
    """Faults of megatron-core 0.16.1 that our code goes around; when one is gone, so may the detour be."""

    def test_router_needs_transformer_engine(self) -> None:
        import torch
        from megatron.core.transformer.moe import moe_utils

        with pytest.raises(NameError, match="te_general_gemm"):
            moe_utils.router_gating_linear(torch.ones(2, 1, 4), torch.ones(3, 4), None, torch.float32)

    def test_a_fresh_import_loads_no_compiler_and_lacks_the_listed_names(self) -> None:
        """`CheckpointWithoutOutput` asks for FP8 by default and then names what only Transformer Engine defines."""
        from qwen3_npu.platform import mcore_fixes

        names = [name.rsplit(".", 1)[1] for name in mcore_fixes.FIXED]
        assert names == ["FP8GlobalStateManager", "activation_recompute_forward", "fp8_autocast"]
        code = f"""
import sys, torch
compiler = torch.compile
from qwen3_npu.platform.mcore_import import import_megatron
import_megatron()
from megatron.core.tensor_parallel import random
assert not any(hasattr(random, n) for n in {names!r}), 'the fix may go'
assert torch.compile is compiler
assert not {{'torch._dynamo', 'torch._inductor', 'wandb'}} & sys.modules.keys()
from megatron.core.fusions import fused_bias_swiglu
assert not hasattr(fused_bias_swiglu.swiglu, '_torchdynamo_orig_callable')
"""
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)

    def test_stock_norm_refuses_sequence_parallelism(self) -> None:
        from megatron.core.transformer.torch_norm import WrappedTorchNorm
        from megatron.core.transformer.transformer_config import TransformerConfig

        config = TransformerConfig(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=1,
            normalization="RMSNorm",
            tensor_model_parallel_size=1,
        )
        config.sequence_parallel = True
        with pytest.raises(AssertionError):
            WrappedTorchNorm(config, 8)

    def test_interleaved_pipelines_are_never_batched_and_outputs_kept_on_gloo(self) -> None:
        """Both give wrong losses with exit status 0 otherwise."""
        import tiny
        from qwen3_npu.args.parallel import ParallelArgs, make_layout
        from qwen3_npu.args.training import TrainArgs
        from qwen3_npu.model.config import transformer_config
        from qwen3_npu.platform import select_platform

        parallel = ParallelArgs(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1)
        arch = tiny.arch()
        safe = select_platform("cpu").overlaps_p2p_safely
        config = transformer_config(
            arch, make_layout(arch, parallel), parallel, TrainArgs(train_iters=1), overlaps_p2p_safely=safe
        )
        assert (config.overlap_p2p_comm, config.batch_p2p_comm) == (True, False)
        for how, batched in (("auto", True), ("batched", True), ("pairs", False)):
            parallel = ParallelArgs(pipeline_model_parallel_size=2, p2p_communication=how)
            plain = transformer_config(
                arch, make_layout(arch, parallel), parallel, TrainArgs(train_iters=1), overlaps_p2p_safely=safe
            )
            # With the last one megatron waits for the whole device after each exchange.
            assert (plain.overlap_p2p_comm, plain.batch_p2p_comm, plain.batch_p2p_sync) == (False, batched, False)
        assert config.deallocate_pipeline_outputs is False

    def test_torch_device_blocks_still_work_under_the_redirect(self) -> None:
        import torch

        with torch.device("meta"):
            assert torch.zeros(2).is_meta
            assert torch.tensor([1]).is_meta
        assert torch.zeros(2, device="cuda").device.type == "cpu"

    def test_undeclared_dependency_is_declared_here(self) -> None:
        from pathlib import Path

        assert "psutil" in (Path(__file__).resolve().parents[3] / "pyproject.toml").read_text()

    def test_entry_points_have_a_main_guard(self) -> None:
        """Saving in the torch_dist format starts a spawned process, which imports the main script again."""
        from pathlib import Path

        for script in Path(__file__).resolve().parents[3].glob("*.py"):
            assert 'if __name__ == "__main__":' in script.read_text(), script

    def test_recomputed_dropout_inside_a_fork_drops_what_forward_dropped(self) -> None:
        """As attention's after a hidden dropout under sequence parallelism."""
        import torch
        from megatron.core.tensor_parallel import random

        tracker, x = random.get_cuda_rng_tracker(), torch.ones(64, requires_grad=True)

        def dropped(x: torch.Tensor) -> torch.Tensor:
            with tracker.fork():
                return torch.nn.functional.dropout(x, 0.5)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tracker, "states_", {"model-parallel-rng": torch.Generator().manual_seed(7).get_state()})
            with tracker.fork():
                torch.nn.functional.dropout(dropped(x.detach()), 0.5)
                out = random.checkpoint(dropped, False, x)
            out.sum().backward()
            after = dropped(x.detach())
        assert torch.equal(x.grad, out.detach())
        assert not torch.equal(after, out.detach()), "the stream goes on"
