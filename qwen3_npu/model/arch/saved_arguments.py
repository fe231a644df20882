"""Which of a checkpoint's arguments say what the network computes, and which of those are computed here. No torch.

A checkpoint of Megatron-LM or MindSpeed-LLM holds hundreds of arguments. One that has a value (not off, zero or empty):

1. is translated (`facts.py`, `megatron.py`), or
2. has its only value in `_ONLY`, or
3. is known to change nothing that a trained network computes: a name in `WITHOUT_EFFECT`, or one with a word of
   `_EXECUTION` in it (how it is computed: fusion, recomputing, communication, precision; how it is trained), or
4. has no word of a network (`_NETWORK`) in its name but one of `_OTHERS`: paths, data, logging, schedules, or
5. is named: with a word of a network it is refused, since it may say that the network is another one; with none, the
   log says once that it is not known and is taken to change nothing.

So an argument that a later version adds is refused if it sounds like a part of the network and is switched on. Source
of the names: the parsers of megatron-core 0.8 to 0.19 and of MindSpeed-LLM 2.1.0 and c77308a, and config.json's keys,
which MindSpeed-LLM's converter copies into its arguments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping

from qwen3_npu import log
from qwen3_npu.errors import UsageError, printable
from qwen3_npu.model.arch.facts import FACTS
from qwen3_npu.schema import shown

# Argument -> the only values that are computed here.
_ONLY: dict[str, tuple[object, ...]] = {
    "position_embedding_type": ("rope", "yarn"),
    "rotary_percent": (1.0,),
    "rope_type": ("rope", "default"),
    "partial_rotary_factor": (1.0,),
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "activation_func": ("silu",),
    "hidden_act": ("silu",),
    "moe_model_type": ("megatron_moe",),
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_scaling_factor": (1.0,),
    "routed_scaling_factor": (1.0,),
    "moe_router_num_groups": (1,),
    "moe_router_group_topk": (1,),
    "n_group": (1,),
    "topk_group": (1,),
    "decoder_sparse_step": (1,),
    "first_k_dense_replace": (-1,),
    "cla_share_factor": (1,),
    "softmax_type": ("vanilla",),
    "scale_emb": (1.0,),
    "embedding_multiplier_scale": (1.0,),
    "output_multiplier_scale": (1.0,),
    "mup_embedding_mult": (1.0,),
    "mup_attn_scale_power": (1.0,),
    "mup_width_mult": (1.0,),
    "dynamic_factor": (1.0,),
    "qkv_type": ("unpack",),
    "gated_linear_unit": (True,),
    "full_attention_interval": (1,),
    "mup_output_mult": (1.0,),
    "dim_model_base": (0,),
    "moe_router_force_load_balancing": (False,),
    "moe_router_load_balancing_bias": (False,),
    "parallel_attention": (False,),
    "parallel_residual": (False,),
    "use_parallel_residual": (False,),
    "parallel_output_layernorm": (False,),
}
# These say something by being off.
_NEVER_OFF = ("swiglu", "rotary_percent")
_MEGATRON_TRANSLATED = """
    num_layers noop_layers num_layer_list qk_layernorm add_qkv_bias add_dense_bias hf_model_type group_query_attention
    use_rope_scaling rope_scaling_type rope_scaling_factor rotary_seq_len_interpolation_factor rotary_scaling_factor
    beta_fast beta_slow low_freq_factor high_freq_factor mscale mscale_all_dim original_max_position_embeddings
    eos_token_id moe_router_pre_softmax moe_grouped_gemm tie_word_embeddings num_hidden_layers
    use_rslora own_dtypes max_window_layers sliding_window layer_types window_size moe_layer_freq softmax_scale
    moe_router_load_balancing_type
""".split()  # noqa: SIM905
_TRANSLATED = {name for fact in FACTS for name in fact.megatron} | set(_MEGATRON_TRANSLATED)
# Names whose beginning says that another argument, which is refused, must be on for them to mean anything; or whose
# tensors would have other names.
_DEPENDENT = re.compile(
    r"(yarn|rope_scaling|mamba|linear_(conv|key|num|value)|dsa_indexer|index|indexer|hc|mhc|mla|qk_clip|retro|biencoder"
    r"|ict|retriever|mask|relative_attention|kitchen|mtp_loss|lora|lu_lora|balanced"
    r"|deprecated|q_lora|kv_lora|o_lora|o_groups|hybrid_context)(_|$)"
)
WITHOUT_EFFECT = frozenset(
    """
    add_position_embedding use_rotary_position_embeddings transformer_impl attention_mask_type reset_attention_mask
    use_flash_attn apply_query_key_layer_scaling persist_layer_norm no_persist_layer_norm
    memory_efficient_layer_norm clone_scatter_output_in_embedding create_attention_mask_in_dataloader
    encoder_num_layers encoder_seq_length decoder_num_layers decoder_seq_length standalone_embedding_stage
    defer_embedding_wgrad_compute num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 mlp_chunks_for_prefill
    mlp_chunks_for_training bert_binary_head moe_router_bias_update_rate moe_router_padding_for_fp8
    moe_router_padding_for_quantization moe_per_layer_logging moe_expert_capacity_factor moe_train_capacity_factor
    moe_pad_expert_input_to_capacity moe_input_jitter_eps moe_no_drop moe_revert_type_after_topk
    moe_token_drop_policy moe_dynamic_padding moe_unperm2_mem_optim moe_hierarchical_alltoallv moe_use_grouped_tensor
    moe_use_legacy_grouped_gemm
    moe_single_grouped_weight moe_tp_extend_ep moe_extended_tp moe_zero_memory moe_router_fusion mlp_experts_flag
    qk_head_dim qk_pos_emb_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim compress_rope_theta
    sliding_window_size moba_topk compress_activation gamma_beta_ratio
    kv_head_repeat_before_uly_alltoall use_ulysses_allgather_kv unaligned_linear output_layer_slice_num
    pipe_experts_multi_data pipe_experts_multi_stream use_pipe_experts shared_expert_gate_output_dimension
    window_attn_skip_freq adaptive_cp_manually_set_mask_list print_expert_load save_layer_by_layer attn_implementation
    top_k top_p head_lr_mult initializer_range use_cache output_attentions output_hidden_states
    pad_token_id bos_token_id unk_token_id num_token swap_attention noise_std
    vpprank_layer_idxs pprank_layer_idxs
    qk_clip expert_interval throughput_window_size replication_factor use_mamba_mem_eff_path query_in_block_prob
    use_layer_wise_param_layout expert_gtp_weight_remat_size pre_tockens next_tockens sparse_mode skip_bias_add
    longrope_freqs_type rope_factor moba_chunk_size moba_calc_method cliprange_value reset_position_ids
    no_shared_storage wgrad_deferral_limit embedding_path interleave_probs scale_fmt moe_token_dropping
    dir input mode model_name model_type output_path spec gdp_num_householder gtp_weight_remat_size shape_order
    min_offloaded_tensor_size long_factor short_factor fc_type
    num_microbatches_with_partial_activation_checkpoints use_grouped_gemm_for_dense_mlp use_triton_swiglu_limit
    use_grouped_gemm_for_shared_expert output_bert_embeddings mtp_mem_efficient_logits use_kitchen_attention
""".split()  # noqa: SIM905
)
_NETWORK = frozenset(
    """
    act activation alibi altup attention attn bias capping clamp cla conv csa decoder deepnorm dense dsa emb embed
    embedding embeddings embeds encoder expert experts ffn flextron freq gate gated gdn geglu gelu glu head heads
    heterogeneous
    hidden hybrid hyper indexer
    interleave interleaved interpolation key kv latent layer layernorm layers limit linear logit logits longrope mamba
    mhc mla mlp moba moe mrope mscale mtp mup multiplier ngram norm normalization ntk offset pos position positions post
    pre qk qkv query recurrent ratios relu residual rmsnorm rnn rope rotary router routed rwkv sandwich scale scaled
    scaling selu shared share sigmoid silu sink sinkhorn sinks sliding softcap softcapping softmax sparse ssm swiglu
    swish theta tie tied topk v value window xielu yarn zero
""".split()  # noqa: SIM905
)
_EXECUTION = frozenset(
    """
    fused fusion recompute overlap dropout init initial initialization initializer log logging loss lr wd decay dtype
    fp8 fp4 fp16 fp32 bf16 offload offloading swap mc2 comm communication cp ep tp pp vpp pipeline parallel
    checkpoint checkpointing ckpt inference rl grpo ppo dpo simpo kto fim dino vision vit muon hccl gloo nccl process
    rank ranks node nodes cuda graph placement dispatcher kernel kernels backend impl cpu export hot deepep
    hybridep ncclep cache routing stash grad gradient async save load te batch seed seq seqlen seqs gc profile profiler
    profiling calc clip stream streams dataloader dataset data prefetch buffer bucket optimizer adam sgd lion soap iter
    iters iteration iterations train eval valid test warmup interval upcycling freeze fsdp shard sharding sharded
    memory version tensorboard wandb timing timers stage stages deterministic fake
    quant quantization qat qad qlora nvtx straggler onnx tokenizer vocab allgather alltoall permute permutation
    activations retain layerzero
""".split()  # noqa: SIM905
)

_OTHERS = frozenset(
    """
    a2avc advantage aiqos align allreduce ampipe append autoresume availability backbone barrier best broadcast channels
    check checking chunked classes coc coef coeff command compress config configs convert critic cvt datadump datasets
    ddp deter dim1 dist distrib distributed document dualpipev dump elements ema embedder engine entropy exit
    experimental file files fill filter finetune folder framework gamma gather gbs gemm gigatoken global greedy ground
    handler hbmfault hf history hysteresis image img infer injection inprocess integrity jit jitter keys lam len length
    level loader logger master matmul mbs megatron metadata method mg micro models msc nanopipe newlines nnodes nproc
    offloaded optim optimization or otel pack package pad padded partial patch path penalty postprocess pref prefix
    pretrain prob probs project prompt prompts queue reasoning reboot recent recorder reducescatter ref registration
    rejected release remote replication rerun reshardable reverse reward rng rts rules run runtime sample samples
    sampling saver scheduler sendrecv sent seq1f1b settings sft shapes sharp shuffle split splits strategy streaming
    subs surplus task temperature template tflops thinking thought timeout token tokens torch training trust ttp
    validate validation verifier verify workers world yaml zero3
""".split()  # noqa: SIM905
)


def refuse_others(said: Mapping[str, object], where: str, ignored: Collection[str] = ()) -> None:
    """Look at every argument that is not None; see the top of this file.

    Args:
        ignored: names that the user says have no effect.

    Raises:
        UsageError: one names an architecture that is not computed here, or may do so; of others that are not known the
            log says so.
    """
    unknown = []
    for name, value in said.items():
        if name not in ignored and (expected := _other(name, value, said)):
            raise UsageError(f"{where}: {name} {shown(value)} {expected}")
        if name not in ignored and _is_unknown(name, value):
            unknown.append(f"{printable(name)} {shown(value)}")
    if unknown:
        log.warning_once(
            f"{where}: its args have {', '.join(unknown[:8])}{' ...' * (len(unknown) > 8)}, which are not known here; "
            "they are taken to change nothing that the network computes"
        )


def unlike(where: str, name: str, value: object, allowed: str) -> UsageError:
    """An argument's value that names another architecture."""
    return UsageError(f"{where}: {name} {shown(value)} {_only(allowed)}")


def _only(allowed: str) -> str:
    return f"is another architecture; only {allowed} is computed here"


def _other(name: str, value: object, said: Mapping[str, object]) -> str | None:
    """What is wrong with one argument."""
    if name in _ONLY:
        off = name not in _NEVER_OFF and not isinstance(value, str) and _is_off(value)
        return None if off or value in _ONLY[name] else _only(shown(_ONLY[name][0]))
    if name in _WHOLE:
        return None if _is_off(value) or _WHOLE[name](value, said) else _only(_WHOLE_WORDS[name])
    if _is_off(value) or name in _TRANSLATED or name in WITHOUT_EFFECT:
        return None
    words = _words(name)
    if not words & _NETWORK or words & _EXECUTION or _DEPENDENT.match(name):
        return None
    return f"{_only('off')} (if it changes nothing that the network computes: convert with --ignore-args {name})"


def _words(name: str) -> set[str]:
    return set(name.lower().split("_"))


def _is_unknown(name: str, value: object) -> bool:
    """Whether an argument that is not refused is one that no word of its name tells to be harmless."""
    known = name in _ONLY or name in _WHOLE or name in _TRANSLATED or name in WITHOUT_EFFECT
    return not (known or _is_off(value) or _DEPENDENT.match(name) or _words(name) & (_EXECUTION | _OTHERS))


def _is_off(value: object) -> bool:
    """Whether a value switches nothing on."""
    return value is None or value is False or value in (0, "", "none", "None", "disable") or value in ([], (), {})


def _every_layer(value: object, said: Mapping[str, object]) -> bool:
    if isinstance(value, str):
        return bool(re.fullmatch(r"\(?\[1\](\*\d+)?\)?", value))
    return value in (1, -1) or (isinstance(value, (list, tuple)) and set(map(str, value)) == {"1"})


def _usual_scale(value: object, said: Mapping[str, object]) -> bool:
    width = said.get("kv_channels") or said.get("head_dim")
    if not isinstance(value, (int, float)) or not isinstance(width, int):
        return False
    return math.isclose(value, width**-0.5, rel_tol=1e-6)


# Arguments judged by more than a list of values: name -> whether a value is computed here.
_WHOLE: dict[str, Callable[[object, Mapping[str, object]], bool]] = {
    "window_size": lambda value, said: (
        tuple(value) in ((-1, -1), (-1, 0)) if isinstance(value, (list, tuple)) else False
    ),
    # Hugging Face's key: it counts only beside use_sliding_window.
    "sliding_window": lambda value, said: said.get("use_sliding_window") is False,
    "layer_types": lambda value, said: isinstance(value, (list, tuple)) and set(map(str, value)) == {"full_attention"},
    "moe_layer_freq": _every_layer,
    "softmax_scale": _usual_scale,
    "moe_router_load_balancing_type": lambda value, said: "sinkhorn" not in str(value),
}
_WHOLE_WORDS = {
    "window_size": "the whole sequence",
    "sliding_window": "the whole sequence",
    "layer_types": "full_attention",
    "moe_layer_freq": "1",
    "softmax_scale": "1 / sqrt(kv_channels)",
    "moe_router_load_balancing_type": "top-k of softmax",
}
