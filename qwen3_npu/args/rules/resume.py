"""What a training that is resumed must have as it was. No torch."""

from __future__ import annotations

# Name in the args of a checkpoint -> what a change of it would mean (`checkpoint.training.compare`).
REFUSED = {
    "stage": "position",
    "seed": "position",
    "seq_length": "position",
    "data_digest": "position",
    "data_weights": "position",
    "split": "position",
    "shuffle": "position",
    "global_batch_size": "steps",
    "reset_attention_mask": "model",
    "reset_position_ids": "model",
    "eod_mask_loss": "model",
    "rotary_base": "model",
    "norm_epsilon": "model",
    "rope_scaling": "model",
    "moe_router_topk": "model",
    "norm_topk_prob": "model",
    "bf16": "numbers",
}
