"""Self-attention: fused qkv, norm of each query and key head if the family has it, rotary embedding, causal."""

from __future__ import annotations

import dataclasses

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from qwen3_npu.distributed.context_parallel import ContextParallel
from qwen3_npu.kernels import Kernels
from qwen3_npu.model.cache import CachedSequence, PrefixedSequence
from qwen3_npu.model.sequence import TokenSequence
from qwen3_npu.model.swap import LayerSwap, arriving, kept_in_place, saving


@dataclasses.dataclass(frozen=True)
class AttentionSubmodules:
    """The modules of the attention."""

    linear_qkv: ModuleSpec | type
    q_layernorm: ModuleSpec | type
    k_layernorm: ModuleSpec | type
    linear_proj: ModuleSpec | type


class SelfAttention(MegatronModule):
    """Grouped-query attention over one micro-batch.

    Replaces megatron's SelfAttention through the spec, with the same parameter names: megatron's core attention refuses
    packed documents and context parallelism without Transformer Engine, and rotary embedding cannot be replaced alone.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: AttentionSubmodules,
        layer_number: int,
        *,
        kernels: Kernels,
        context_parallel: ContextParallel | None,
        output_bias: bool,
        pg_collection: ProcessGroupCollection,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        self.layer_number, self.kernels = layer_number, kernels
        self.context_parallel, self.cp_group = context_parallel, pg_collection.cp
        self.head_dim = config.kv_channels
        self.scale = self.head_dim**-0.5
        self.tp_group, tp = pg_collection.tp, pg_collection.tp.size()
        self.heads_per_group = config.num_attention_heads // config.num_query_groups
        self.local_groups = max(config.num_query_groups // tp, 1)
        # Number of ranks that share one key/value head; each has a part of its query heads.
        self.sharing = max(tp // config.num_query_groups, 1)
        query_width, key_width = config.num_attention_heads * self.head_dim, config.num_query_groups * self.head_dim
        self.linear_qkv = build_module(
            submodules.linear_qkv,
            config.hidden_size,
            query_width + 2 * key_width,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=config.add_qkv_bias,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=pg_collection.tp,
        )
        norm = {"config": config, "hidden_size": self.head_dim, "eps": config.layernorm_epsilon}
        self.q_layernorm = build_module(submodules.q_layernorm, **norm)
        self.k_layernorm = build_module(submodules.k_layernorm, **norm)
        self.linear_proj = build_module(
            submodules.linear_proj,
            query_width,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=output_bias,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=pg_collection.tp,
        )
        self.recompute = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        # A norm that is computed again fills the memory of its output itself.
        self.owns_input = "layernorm" not in config.recompute_modules or config.recompute_granularity != "selective"
        self.swap: LayerSwap | None = None

    def forward(
        self, hidden_states: torch.Tensor, *, packed_seq_params: TokenSequence, **_: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One layer's attention.

        Args:
            hidden_states: [s, b, hidden] (s / TP under sequence parallelism).
            packed_seq_params: positions and documents of the tokens.

        Returns:
            [s, b, hidden] (sharded as the input), and the bias that the caller must add, if the family has one.
        """
        q, k, v = self.query_key_value(hidden_states)
        cos, sin = packed_seq_params.cos_sin

        def core(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self.core_attention(q, k, v, packed_seq_params)

        if self.owns_input:
            kept_in_place(self.swap, hidden_states, self.linear_qkv)
        with saving(self.swap):
            # The queries of different groups lie apart in memory until their norm writes them side by side.
            q = self.kernels.rotary(self.q_layernorm(q).flatten(2, 3), cos, sin)
            k = self.kernels.rotary(self.k_layernorm(k), cos, sin)
            out = tensor_parallel.checkpoint(core, False, q, k, v) if self.recompute else core(q, k, v)
        out = out.flatten(2)
        kept_in_place(self.swap, out, self.linear_proj)
        projected, bias = self.linear_proj(out)
        arriving(self.swap, projected)
        return projected, bias

    def query_key_value(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [s, b, g, n / g, d] and k, v [s, b, g, d] of this TP rank's heads."""
        mixed, _ = self.linear_qkv(hidden_states)
        if self.sharing > 1:
            return self._shared_head(mixed)
        s, b, _ = mixed.shape
        mixed = mixed.view(s, b, self.local_groups, self.heads_per_group + 2, self.head_dim)
        q, k, v = mixed.split([self.heads_per_group, 1, 1], dim=3)
        return q, k.squeeze(3), v.squeeze(3)

    def _shared_head(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`query_key_value` for more ranks than key/value heads: the rows of a head lie on several ranks.

        All rows are gathered as in megatron-core 0.16, so every rank has the same result.
        """
        whole = tensor_parallel.all_gather_last_dim_from_tensor_parallel_region(mixed, group=self.tp_group)
        s, b, _ = whole.shape
        rank = self.tp_group.rank()
        whole = whole.view(s, b, -1, self.heads_per_group + 2, self.head_dim)[:, :, rank // self.sharing]
        q, k, v = whole.split([self.heads_per_group, 1, 1], dim=2)
        return q.chunk(self.sharing, dim=2)[rank % self.sharing].unsqueeze(2), k, v

    def core_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequence: TokenSequence
    ) -> torch.Tensor:
        """Attention of the local heads; dropout, if any, differs between TP ranks."""
        if isinstance(sequence, CachedSequence | PrefixedSequence):
            return sequence.attend(self.layer_number, self.kernels, q, k, v=v, scale=self.scale)
        dropout = self.config.attention_dropout if self.training else 0.0
        options = {"scale": self.scale, "cu_seqlens": sequence.cu_seqlens, "dropout": dropout}

        def attend() -> torch.Tensor:
            if self.context_parallel is not None:
                return self.context_parallel.attention(q, k, v, self.cp_group, **options)
            return self.kernels.attention(q, k, v, **options)

        if dropout == 0.0:
            return attend()
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return attend()
