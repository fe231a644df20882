"""Arguments of Megatron and MindSpeed-LLM: what their trainings save is taken; what names another network is not."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

import tiny
from qwen3_npu.errors import UsageError
from qwen3_npu.model.arch.megatron import from_megatron, to_megatron
from qwen3_npu.model.arch.saved_arguments import refuse_others

PLAIN = {**to_megatron(tiny.arch()), "num_layers": 4, "hf_model_type": None}
# What is on after the parsers of megatron-core 0.8, 0.12.1, 0.16.1 and 0.19 and of MindSpeed-LLM 2.1.0 and c77308a have
# run with the flags of a small Qwen3: argument -> its values.
REAL: dict[str, list[Any]] = json.loads((Path(__file__).parents[2] / "saved_arguments.json").read_text())
FLAGS = Path(__file__).parents[2] / "mindspeed_flags.txt"
# What MindSpeed-LLM's converter adds: config.json's keys, and its own settings.
CONVERTER: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "first_k_dense_replace": 0,
    "fc_type": "gate_up_down",
    "group_query_attention": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "layer_types": ["full_attention"] * 4,
    "max_window_layers": 48,
    "mlp_experts_flag": True,
    "mlp_only_layers": [],
    "model_type": "qwen3",
    "model_type_hf": "qwen3",
    "moe_layer_freq": 1,
    "qkv_type": "unpack",
    "rope_scaling": None,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "use_cache": True,
    "use_sliding_window": False,
}


# Flags of the network in MindSpeed-LLM's scripts for which 2 is no value that is computed here.
NETWORK = {"swiglu", "normalization", "position_embedding_type", "moe_layer_freq", "first_k_dense_replace"}


def is_taken(name: str, value: object) -> bool:
    try:
        refuse_others({name: value}, "x")
    except UsageError:
        return False
    return True


def test_what_real_trainings_save_is_taken() -> None:
    first = {name: values[0] for name, values in REAL.items()}
    assert from_megatron({**first, **PLAIN}, "x") == tiny.arch()
    for name, values in REAL.items():
        for value in values:
            refuse_others({name: value}, "x")
    # What users of MindSpeed-LLM's scripts set besides; --disable-bias-linear is add_bias_linear there.
    flags = [line.split()[1] for line in FLAGS.read_text().splitlines() if re.match(r"\d+ --", line)]
    named = {flag[2:].replace("-", "_") for flag in flags} - {"disable_bias_linear"}
    assert {name for name in named if not is_taken(name, 2)} == NETWORK


def test_what_nobody_knows_is_refused_with_the_way_out_whatever_its_name_sounds_like() -> None:
    unknown = {"flux_capacitor": 3, "attention_kernel_size": 4, "parallel_token_mixing": True, "save_the_whales": True}
    off = {"zap": None, "quadratic_mixing": False, "mixing_depth": 0, "mixing": "", "mixers": []}
    with pytest.raises(UsageError) as refused:
        from_megatron({**PLAIN, **CONVERTER, **unknown, **off}, "/c")
    assert str(refused.value) == (
        "/c: flux_capacitor 3, attention_kernel_size 4, parallel_token_mixing true are other architectures or not "
        "known here; what changes nothing that the network computes is left out by convert_ckpt.py --ignore-args "
        "flux_capacitor attention_kernel_size parallel_token_mixing"
    )
    with pytest.raises(UsageError, match=r"flux_capacitor 3 is another architecture or not known here"):
        refuse_others({"flux_capacitor": 3, "lr_curve": "round"}, "/c", own=["lr_curve"])
    assert from_megatron({**PLAIN, **CONVERTER, **off}, "/c") == tiny.arch()


def test_what_their_converter_saves_is_taken() -> None:
    assert from_megatron({**PLAIN, **CONVERTER}, "x") == tiny.arch()
    assert from_megatron({**PLAIN, **CONVERTER, "sliding_window": 4096}, "x") == tiny.arch()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def test_a_copy_of_config_jsons_rotary_embedding_counts() -> None:
    import torch
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    arch = from_megatron({**PLAIN, "rotary_base": None, "rope_scaling": {**YARN, "rope_theta": 5e5}}, "x")
    config = transformers.Qwen3Config(
        head_dim=arch.head_dim, max_position_embeddings=512, rope_parameters={**YARN, "rope_theta": 5e5}
    )
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    rope = arch.rope
    plain = 5e5 ** -(torch.arange(0, arch.head_dim, 2) / arch.head_dim)
    torch.testing.assert_close(plain / torch.tensor(rope.divisors), expected)
    assert rope.attention_factor == pytest.approx(factor)
    both = {"rope_scaling": YARN, "rope_scaling_type": "yarn", "rope_scaling_factor": 4.0}
    same = from_megatron({**PLAIN, **both, "rope_scaling_original_max_position_embeddings": 128}, "x")
    assert same.rope_scaling == arch.rope_scaling
    for other, (value, message) in {
        "rope_parameters": ({"rope_theta": 1e4}, "rotary_base 1000000.0 and rope_parameters.rope_theta 10000.0 differ"),
        "rope_scaling": ({"rope_type": "longrope"}, "'longrope' is not supported"),
        "rope_scaling_type": ("yarn", "rope_scaling_factor is missing"),
    }.items():
        with pytest.raises(UsageError, match=message):
            from_megatron({**PLAIN, other: value}, "x")


OTHERS = {
    "rotary_percent": 0.5,
    "rotary_interleaved": True,
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "swiglu": False,
    "squared_relu": True,
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "qk_layernorm": False,
    "multi_latent_attention": True,
    "window_size": (128, 0),
    "apply_layernorm_1p": True,
    "rope_scaling_type": "longrope",
    "dynamic_factor": 2.0,
    "use_glm_rope": True,
    "moe_layer_freq": 2,
    "mtp_num_layers": 1,
    "attention_output_gate": True,
    "hf_model_type": "gemma3",
    "layer_types": ["full_attention", "sliding_attention"],
    "sliding_window": 4096,
    "softmax_scale": 0.5,
    "swiglu_limit": 7.0,
    "moe_router_load_balancing_type": ["aux_loss", "sinkhorn"],
    "moe_router_force_load_balancing": True,
    "activation_func_clamp_value": 7.0,
    "qkv_type": "mix",
    # of no version yet
    "use_differential_attention": True,
    "logit_scale": 0.0625,
    "residual_multiplier": 0.22,
    "embedding_scale_by_sqrt_dim": True,
    "attention_sink_size": 4,
    "use_parallel_residual": True,
    "ngram_embeddings": "2,3",
    "cross_layer_kv_sharing": 2,
    "xielu": True,
}


@pytest.mark.parametrize("name", OTHERS)
def test_arguments_of_another_architecture_are_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=name) as refused:
        from_megatron({**PLAIN, name: OTHERS[name]}, "/ckpt/model_optim_rng.pt")
    assert "\n" not in str(refused.value)


# Fields of Megatron's configuration that change how a trained network is computed, not what: read one by one.
HOW = """
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split attention_backend hidden_dropout
    attention_dropout fp32_residual_connection activation_func_fp8_input_store qk_clip qk_clip_alpha qk_clip_threshold
    log_max_attention_logit test_mode calculate_per_token_loss init_method output_layer_init_method init_method_std
    embedding_init_method embedding_init_method_std init_model_with_meta_device apply_query_key_layer_scaling
    attention_softmax_in_fp32 disable_bf16_reduced_precision_matmul bias_activation_fusion masked_softmax_fusion
    persist_layer_norm memory_efficient_layer_norm bias_dropout_fusion apply_rope_fusion
    use_fused_weighted_squared_relu fused_single_qkv_rope recompute_granularity recompute_method recompute_num_layers
    distribute_saved_activations recompute_modules fp8 fp8_recipe fp8_param fp8_quantizer_factory fp8_margin
    fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad fp8_dot_product_attention
    fp8_multi_head_attention tp_only_amax_red first_last_layers_bf16 num_layers_at_start_in_bf16
    num_layers_at_end_in_bf16 use_kitchen use_kitchen_attention kitchen_attention_backend fp4 fp4_recipe fp4_param
    fp4_quantizer_factory moe_shared_expert_overlap moe_router_load_balancing_type moe_enable_routing_replay
    moe_router_padding_for_quantization moe_router_padding_for_fp8 moe_router_dtype moe_router_bias_update_rate
    moe_grouped_gemm moe_use_legacy_grouped_gemm moe_aux_loss_coeff moe_z_loss_coeff moe_input_jitter_eps
    moe_token_dropping moe_token_dispatcher_type moe_enable_deepep moe_flex_dispatcher_backend moe_per_layer_logging
    moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy moe_layer_recompute
    moe_permute_fusion moe_router_fusion moe_deepep_num_sms moe_hybridep_num_sms cp_comm_type enable_cuda_graph
    cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_warmup_steps external_cuda_graph
    cuda_graph_impl cuda_graph_scope clone_scatter_output_in_embedding disable_parameter_transpose_cache
    config_logger_dir flash_decode batch_invariant_mode use_te_activation_func use_te_rng_tracker
    inference_rng_tracker inference_sampling_seed symmetric_ar_type use_inference_optimized_layers
    inference_fuse_tp_communication use_mamba_mem_eff_path mlp_chunks_for_prefill hetereogenous_dist_checkpoint
    quant_recipe transformer_impl fine_grained_activation_offloading offload_modules min_offloaded_tensor_size
    pipeline_model_parallel_layout num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
    mtp_loss_scaling_factor
""".split()  # noqa: SIM905
# Honoured, or without a meaning unless another one of them is on, which is refused.
READ = """
    num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size kv_channels layernorm_epsilon
    add_qkv_bias num_moe_experts qk_layernorm moe_ffn_hidden_size moe_router_topk moe_router_pre_softmax
    window_attn_skip_freq dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_loss_coeff
    dsa_indexer_use_sparse_loss linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads
    linear_num_value_heads mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads
""".split()  # noqa: SIM905


def test_every_field_of_megatrons_configuration_is_judged() -> None:
    spec = importlib.util.find_spec("megatron")
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "core" / "transformer" / "transformer_config.py"
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    (config,) = (node for node in classes if node.name == "TransformerConfig")
    own = {field.target.id for field in config.body if isinstance(field, ast.AnnAssign)}  # type: ignore[union-attr]
    assert len(own) > 150
    assert {name for name in own if is_taken(name, 3)} == {*HOW, *READ} & own


WEIRD = ("x", "2", 2.5, float("nan"), -1, 0, 2**70, [1], ["a"], {"a": 1}, (1, 2), True, {1, 2}, b"x", [[[1]]], object())


def test_an_argument_of_any_type_is_read_or_refused_in_one_line() -> None:
    names = {*PLAIN, *YARN, "rope_scaling", "rope_scaling_type", "rope_scaling_factor", "window_size", "layer_types"}
    names |= {"moe_layer_freq", "softmax_scale", "reward_model", "noop_layers", "model_type", "norm_topk_prob"}
    taken = {}
    for name in names:
        for value in WEIRD:
            try:
                taken[name, str(value)] = from_megatron({**PLAIN, name: value}, "/c")
            except UsageError as error:
                assert str(error).isprintable(), name  # noqa: PT017 - either outcome is right
    for (name, value), arch in taken.items():
        assert all(type(token) is int for token in arch.eos_token_ids), (name, value)
        json.dumps(to_megatron(arch))
    two = from_megatron({**PLAIN, "eos_token_id": [7, 9]}, "/c")
    assert two.eos_token_ids == (7, 9)
    assert from_megatron({**to_megatron(two), "num_layers": 4}, "/c") == two
