"""Small modules of the layer: norm, activation, MLP and no-op layer. Each calls one kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding, gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    BaseTransformerLayer,
    TransformerLayer,
    get_transformer_layer_offset,
)
from megatron.core.utils import get_pg_rank


def mark(parameter: torch.nn.Parameter, **marks: bool) -> None:
    """Set the attributes by which megatron-core tells parameters apart.

    Args:
        marks: `sequence_parallel`: ranks of the tensor parallel group see different tokens, their gradients are summed.
            `allreduce`: False for experts that are not replicated over the whole data-parallel group.
    """
    for name, value in marks.items():
        setattr(parameter, name, value)


class RMSNorm(torch.nn.Module):
    """RMSNorm that works under sequence parallelism (megatron's own refuses it without Transformer Engine).

    The weight is replicated over TP; its `sequence_parallel` mark makes megatron sum its gradient.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, *, kernel: Callable, eps: float = 1e-6, **_: object
    ) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        mark(self.weight, sequence_parallel=config.sequence_parallel)
        self.kernel, self.eps = kernel, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel(x, self.weight, self.eps)


class SwiGLU(torch.nn.Module):
    """The MLP's activation: [..., 2 ffn] -> [..., ffn]."""

    def __init__(self, config: TransformerConfig, *, kernel: Callable) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel(x)


class RecomputedMLP(MLP):
    """An MLP that keeps the input of its activation but not the output (--recompute-activation-function)."""

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        wide, _ = self.linear_fc1(hidden_states)
        kept = CheckpointWithoutOutput()
        out, bias = self.linear_fc2(kept.checkpoint(self.activation_func, wide))
        kept.discard_output_and_register_recompute(out)
        return out, bias


class Embedding(VocabParallelEmbedding):
    """megatron's, without its writes through a mask: torch_npu reads what is written on the host, and waits for it."""

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        """[b, s] tokens -> [b, s, hidden], or [s / TP, b, hidden] under sequence parallelism."""
        if self.tp_group.size() == 1:
            return super().forward(input_)
        local = input_ - self.vocab_start_index
        elsewhere = (local < 0) | (local >= self.num_embeddings_per_partition)
        local = local.masked_fill_(elsewhere, 0)
        rows = self.weight[local] if self.deterministic_mode else torch.nn.functional.embedding(local, self.weight)
        rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(rows.transpose(0, 1).contiguous(), group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)


class Layer(TransformerLayer):
    """megatron's layer, whose routers learn from the sequence what is padding.

    megatron-core 0.16.1 passes a mask of its own to the layers, but shards it for sequence parallelism on the first
    stage only,
    and forgets it in the layers that `--recompute-method block` does not recompute.
    """

    def forward(self, *args: object, **others: object) -> tuple:
        """As megatron's."""
        padding = getattr(others.get("packed_seq_params"), "padding", None)
        if padding is not None:
            if self.config.sequence_parallel:
                group = self.pg_collection.tp
                padding = padding.chunk(group.size(), dim=1)[group.rank()]
            others["padding_mask"] = padding
        return super().forward(*args, **others)


class NoopLayer(MegatronModule, BaseTransformerLayer):
    """A no-op layer: it holds no weights and changes nothing (--noop-layers)."""

    def __init__(
        self, config: TransformerConfig, layer_number: int = 1, pg_collection: Any = None, vp_stage: int | None = None
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, get_pg_rank(pg_collection.pp))

    def forward(self, hidden_states: torch.Tensor, context: object = None, **_: object) -> tuple[torch.Tensor, Any]:
        return hidden_states, context


class RewardHead(torch.nn.Module):
    """hidden -> 1 without bias, in place of the output layer (transformers' `score`).

    It is whole on every rank of the last pipeline stage. The weight is drawn by `seed`, so it is the same in every
    layout; its deviation is transformers'. Beside a LoRA adapter it is trained and belongs to it, as its name says
    (`checkpoint/mapping/lora.py`).
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
