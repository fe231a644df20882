"""What a change of each argument means for a training that is resumed. No torch.

The names are those in the args of a checkpoint, which are Megatron's where it has one. Megatron refuses another rate or
schedule without --override-opt_param-scheduler, and takes betas and eps silently from the checkpoint; here the flags
say what they are, so that both are told. What is in none of the tables is layout, device or reporting.
"""

from __future__ import annotations

# Group -> why its changes matter, in the message.
REASONS = {
    # refused
    "position": "the position counts samples: text would be repeated or skipped",
    "steps": "steps and learning rate no longer mean the same",
    "trained": "the optimizer has no state of weights that were frozen",
    "model": "the weights were trained as another model",
    "numbers": "weights and optimizer state were made in another precision",
    # told
    "loss": "another loss is learned from here on",
    "noise": "other random numbers are drawn from here on",
    "update": "moments and position are kept, updates follow the flags",
    "rounding": "the same weights are trained, numbers are rounded in another way",
    "schedule": "the position is kept, learning rate and weight decay follow the flags",
    "prompts": "what was learned so far was written in another way",
    # fine
    "length": "a training may be made longer or shorter; the schedule is told",
    "batching": "a step has the same samples",
    "speed": "the result is the same to rounding",
    "start": "only random initial weights depend on it",
    "upkeep": "nothing that is computed depends on it",
}

REFUSED = {
    "stage": "position",
    "seed": "position",
    "seq_length": "position",
    "data_digest": "position",
    "data_weights": "position",
    "split": "position",
    "shuffle": "position",
    "global_batch_size": "steps",
    "freeze_include": "trained",
    "freeze_exclude": "trained",
    "reset_attention_mask": "model",
    "reset_position_ids": "model",
    "eod_mask_loss": "model",
    "rotary_base": "model",
    "norm_epsilon": "model",
    "rope_scaling": "model",
    "moe_router_topk": "model",
    "norm_topk_prob": "model",
    "bf16": "numbers",
    "qlora": "numbers",
    "qlora_embedding": "numbers",
}

WARNED = {
    "fp32_residual_connection": "rounding",
    "loss_normalization": "loss",
    "moe_aux_loss_coeff": "loss",
    "moe_z_loss_coeff": "loss",
    "moe_expert_capacity_factor": "loss",
    "moe_token_drop_policy": "loss",
    "moe_router_load_balancing_type": "loss",
    "moe_router_dtype": "loss",
    "dpo_loss_type": "loss",
    "dpo_beta": "loss",
    "dpo_label_smoothing": "loss",
    "simpo_gamma": "loss",
    "desirable_weight": "loss",
    "undesirable_weight": "loss",
    "pref_ftx": "loss",
    "center_rewards_coefficient": "loss",
    "attention_dropout": "noise",
    "hidden_dropout": "noise",
    "lora_dropout": "noise",
    "adam_beta1": "update",
    "adam_beta2": "update",
    "adam_eps": "update",
    "clip_grad": "update",
    "lr": "schedule",
    "min_lr": "schedule",
    "weight_decay": "schedule",
    "lr_decay_style": "schedule",
    "lr_decay_iters": "schedule",
    "lr_decay_samples": "schedule",
    "lr_warmup_iters": "schedule",
    "lr_warmup_samples": "schedule",
    "lr_warmup_fraction": "schedule",
    "lr_warmup_init": "schedule",
    "lr_wsd_decay_iters": "schedule",
    "lr_wsd_decay_style": "schedule",
    "prompt_type": "prompts",
    "enable_thinking": "prompts",
    "tokenizer_digest": "prompts",
}

FINE = {
    "train_iters": "length",
    "train_samples": "length",
    "epochs": "length",
    "micro_batch_size": "batching",
    "data_path": "batching",  # data_digest says whether the data are the same
    "recompute_granularity": "speed",
    "recompute_method": "speed",
    "recompute_num_layers": "speed",
    "recompute_modules": "speed",
    "recompute_activation_function": "speed",
    "recompute_norm": "speed",
    "loss_compute_mode": "speed",
    "loss_chunk_size": "speed",
    "moe_token_dispatcher_type": "speed",
    "moe_pad_expert_input_to_capacity": "speed",
    "use_distributed_optimizer": "speed",
    "reuse_fp32_param": "speed",
    "swap_optimizer": "speed",
    "swap_optimizer_times": "speed",
    "moe_zero_memory": "speed",
    "overlap_grad_reduce": "speed",
    "overlap_param_gather": "speed",
    "ref_logprobs": "speed",
    "init_method_std": "start",
    "ref_model": "upkeep",  # a reference is opened, not resumed
    "refer_model_iter": "upkeep",
    "is_pairwise_dataset": "upkeep",
    "manual_gc": "upkeep",
    "manual_gc_interval": "upkeep",
}
