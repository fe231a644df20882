"""Experts stacked in two tensors, multiplied by one grouped matrix multiplication each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from qwen3_npu.distributed.turns import offer_turn
from qwen3_npu.kernels import Kernels
from qwen3_npu.model.expert_parallel.exchange import Exchange
from qwen3_npu.model.expert_parallel.overlap import overlapped
from qwen3_npu.model.modules import mark
from qwen3_npu.model.quantized import grouped_product, held, quantized


def is_like_dense(config: TransformerConfig) -> bool:
    """Whether experts are replicated over the same ranks as all other weights, and so reduced with them.

    They are not with expert parallelism, and not if ETP < TP: then ranks of a tensor parallel group hold copies of an
    expert and see different tokens. (megatron-core 0.16.1 checks expert parallelism only.)
    """
    return config.expert_model_parallel_size == 1 and (
        config.expert_tensor_parallel_size == config.tensor_model_parallel_size
    )


class GroupedExperts(MegatronModule):
    """This rank's experts.

    Parameters (MindSpeed-LLM's names and memory layout):
        weight1: [hidden, experts * 2 ffn], memory (expert, hidden, [gate | up]).
        weight2: [experts * ffn, hidden], memory (expert, ffn, hidden).
        Quantized ones are restored as Hugging Face's: (expert, [gate | up], hidden), (expert, hidden, ffn).
    ffn is sharded over the expert tensor parallel group.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        kernels: Kernels,
        pg_collection: ProcessGroupCollection,
        recompute_activation: bool = False,
        recompute_products: bool = False,
        quantize: bool = False,
        double_quantize: bool = False,
    ) -> None:
        """
        Args:
            recompute_activation: recompute the activation in backward instead of keeping it.
            recompute_products: recompute the first product, too.
            quantize, double_quantize: the weights are frozen, in 4 bits; their scales are in 8 bits.
        """
        super().__init__(config=config)
        self.kernels, self.num_local_experts = kernels, num_local_experts
        self.recompute_activation, self.recompute_products = recompute_activation, recompute_products
        # With recomputation, backward has twice as many exchanges.
        self.offers_turn = config.recompute_granularity is not None
        self.hidden = config.hidden_size
        self.ffn = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        self.pg_collection = pg_collection
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()

        def parameter(rows: int, columns: int, dim: int, init: Callable[[torch.Tensor], object]) -> torch.nn.Parameter:
            weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=config.params_dtype, device=device))
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)
            # Experts of different EP ranks are different weights: not summed over the data-parallel group.
            mark(weight, allreduce=is_like_dense(config))
            if config.perform_initialization:
                name = tensor_parallel.random.get_expert_parallel_rng_tracker_name()
                with tensor_parallel.get_cuda_rng_tracker().fork(name):
                    init(weight)
            return weight

        experts = num_local_experts
        self.weight1 = parameter(self.hidden, experts * 2 * self.ffn, 1, config.init_method)
        if quantize:  # quantized one after the other, so that one full weight is in memory at a time
            self.weight1 = quantized(self.weight1, (experts, 2 * self.ffn, self.hidden), is_double=double_quantize)
        self.weight2 = parameter(experts * self.ffn, self.hidden, 0, config.output_layer_init_method)
        if quantize:
            self.weight2 = quantized(self.weight2, (experts, self.hidden, self.ffn), is_double=double_quantize)

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor | Exchange, probs: torch.Tensor | None
    ) -> tuple[torch.Tensor, None]:
        """Run each expert on its tokens.

        Args:
            tokens: [rows, hidden], sorted by expert; with an exchange, see `overlap.overlapped`.
            tokens_per_expert: [experts] int64, counts; on the device unless a capacity makes them constants. Or the
                exchange that brings the experts' rows and is to be hidden by their products.
            probs: [rows], router weight of each row; None: the exchange brings them.

        Returns:
            [rows, hidden], and no bias.
        """
        if isinstance(tokens_per_expert, Exchange):
            return overlapped(self, tokens, tokens_per_expert), None
        assert probs is not None
        product = self.products(tokens_per_expert, len(tokens))

        def between(tokens: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
            wide = self.multiply(1, tokens, product)
            if self.offers_turn:
                offer_turn()
            return self.activate(wide, probs)

        if not (self.training and (self.recompute_activation or self.recompute_products)):
            return self.multiply(2, between(tokens, probs), product), None
        kept = CheckpointWithoutOutput()
        if self.recompute_products:
            narrow = kept.checkpoint(between, tokens, probs)
        else:
            narrow = kept.checkpoint(self.activate, self.multiply(1, tokens, product), probs)
        out = self.multiply(2, narrow, product)
        kept.discard_output_and_register_recompute(out)
        return out, None

    def state_of(self, some: slice) -> dict[str, object]:
        """Attributes other than parameters for a module with some of these experts."""
        return {"num_local_experts": some.stop - some.start}

    def products(self, tokens_per_expert: torch.Tensor, rows: int) -> Callable:
        """A function that multiplies `rows` rows, sorted by expert, by their experts' matrices."""
        return self.kernels.grouped_matmul(tokens_per_expert)

    def activate(self, wide: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        """SwiGLU of each row [rows, 2 ffn], weighted by the router: [rows, ffn]."""
        return self.kernels.weighted_swiglu(wide, probs)

    def multiply(self, which: int, x: torch.Tensor, product: Callable) -> torch.Tensor:
        """Each expert's rows of x times its matrix in weight1 or weight2, by `kernels.grouped_matmul`'s product."""
        weight = self.weight1 if which == 1 else self.weight2
        if held(weight) is not None:
            return grouped_product(x, weight, product)
        return product(x, weight.view(self.num_local_experts, x.shape[-1], -1))
