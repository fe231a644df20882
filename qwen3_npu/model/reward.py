"""The head of a reward model: one number per token, in place of the output layer (transformers' `score`)."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from qwen3_npu.model.modules import mark


class RewardHead(torch.nn.Module):
    """hidden -> 1 without bias, whole on every rank of the last pipeline stage.

    The weight is drawn by `seed` alone, so it is the same in every layout; its deviation is transformers'. Beside
    a LoRA adapter it is trained and belongs to it; its name says so (`checkpoint/mapping/lora.py`).
    """

    def __init__(self, config: TransformerConfig, group: torch.distributed.ProcessGroup, *, seed: int, lora: bool):
        super().__init__()
        drawn = torch.randn(1, config.hidden_size, generator=torch.Generator().manual_seed(seed))
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.nn.Parameter((drawn * config.init_method_std).to(device, config.params_dtype))
        mark(weight, sequence_parallel=config.sequence_parallel)
        self.name = "lora_weight" if lora else "weight"
        self.register_parameter(self.name, weight)
        self.group, self.sequence_parallel = group, config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[s, b, hidden] (under sequence parallelism [s/tp, b, hidden]) -> [s, b] float32.

        In float32, because what counts is the difference of two rewards: bfloat16 has no digits left for it.
        """
        rewards = torch.nn.functional.linear(hidden.float(), getattr(self, self.name).float()).squeeze(-1)
        if self.sequence_parallel:
            # Every rank goes on with the same rewards, and takes back the gradient of its own tokens.
            rewards = gather_from_sequence_parallel_region(rewards, tensor_parallel_output_grad=False, group=self.group)
        return rewards
