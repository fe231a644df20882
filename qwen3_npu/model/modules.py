"""Small modules of the layer: norm, activation, MLP and no-op layer. Each calls one kernel.

Also gradients of weights that are added directly to megatron's sums over the micro-batches (`main_grad`).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    layers,
)
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput, checkpoint
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    BaseTransformerLayer,
    TransformerLayer,
    get_transformer_layer_offset,
)
from megatron.core.utils import get_pg_rank

from qwen3_npu.distributed.turns import offer_turn
from qwen3_npu.kernels import reference
from qwen3_npu.model.quantized import held, looked_up
from qwen3_npu.model.sequence import TokenSequence
from qwen3_npu.model.swap import LayerSwap, saving


def mark(parameter: torch.Tensor, **marks: bool) -> None:
    """Set the attributes by which megatron-core distinguishes parameters.

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
        self,
        config: TransformerConfig,
        hidden_size: int,
        *,
        kernel: Callable,
        add_kernel: Callable,
        eps: float = 1e-6,
        **_: object,
    ) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        mark(self.weight, sequence_parallel=config.sequence_parallel)
        self.kernel, self.add_kernel, self.eps = kernel, add_kernel, eps
        self.swap: LayerSwap | None = None

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The norm of x, in the weight's dtype; with a residual, the norm of their sum, and the sum in its dtype."""
        with saving(self.swap):
            return self.normed(x, residual)

    def normed(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As `forward`."""
        given = x if residual is None else residual
        weight = self.weight if given.dtype == self.weight.dtype else self.weight.to(given.dtype)
        if residual is None:
            return self.kernel(x, weight, self.eps).to(self.weight.dtype)
        normed, total = self.add_kernel(x.to(given.dtype), residual, weight, self.eps)
        return normed.to(self.weight.dtype), total


class SwiGLU(torch.nn.Module):
    """The MLP's activation: [..., 2 ffn] -> [..., ffn]."""

    def __init__(self, config: TransformerConfig, *, kernel: Callable) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel(x)


class DenseMLP(MLP):
    """megatron's MLP: linear, activation, linear.

    Attributes:
        recompute: keep the input of the activation but not the output (--recompute-activation-function).
    """

    def __init__(self, *sizes: object, recompute: bool = False, **options: object) -> None:
        super().__init__(*sizes, **options)
        self.recompute = recompute

    @property
    def adds_residual(self) -> bool:
        """Whether the last product can add the residual."""
        return getattr(self.linear_fc2, "is_one_function", False)

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None, **_: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Args: residual: added to the output, where `adds_residual`."""
        wide, _ = self.linear_fc1(hidden_states)
        options = {} if residual is None else {"residual": residual}
        if not self.recompute:
            return self.linear_fc2(self.activation_func(wide), **options)
        kept = CheckpointWithoutOutput()
        out, bias = self.linear_fc2(kept.checkpoint(self.activation_func, wide), **options)
        kept.discard_output_and_register_recompute(out)
        return out, bias


class Embedding(VocabParallelEmbedding):
    """megatron's embedding without its writes through a mask, for which torch_npu makes the host wait."""

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        """[b, s] tokens -> [b, s, hidden], or [s / TP, b, hidden] under sequence parallelism."""
        return self.rows(input_, self.weight)

    def rows(self, input_: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The same for another table, [vocabulary / TP, any width]."""
        if self.tp_group.size() == 1 and not self.reduce_scatter_embeddings:
            return self._look_up(input_, weight)
        local = input_ - self.vocab_start_index
        elsewhere = (local < 0) | (local >= self.num_embeddings_per_partition)
        local = local.clamp_(0, self.num_embeddings_per_partition - 1)  # an NPU's cores fill no int64 by a mask
        rows = self._look_up(local, weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(rows.transpose(0, 1).contiguous(), group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)

    def _look_up(self, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if held(weight) is not None:
            return looked_up(tokens, weight)
        return weight[tokens] if self.deterministic_mode else torch.nn.functional.embedding(tokens, weight)


class Layer(TransformerLayer):
    """megatron's layer; its router gets the padding from the sequence.

    megatron-core 0.16.1 passes a mask of its own to the layers, but shards it for sequence parallelism on the first
    stage only, and forgets it in the layers that `--recompute-method block` does not recompute.

    With --fp32-residual-connection the residual is float32: norms read it and give the weights' dtype, and sums with a
    branch of that dtype are float32.

    The sum of the residual and of the attention, and the norm of it, are one kernel. The norm's module calls it:
    `--overlap-param-gather` waits for a weight in the call of the module that owns it.
    """

    def __init__(self, *sizes: object, **options: object) -> None:
        super().__init__(*sizes, **options)
        # Recomputed norms and dropout before the sum need the sum and the norm apart.
        recomputes = self.recompute_input_layernorm or self.recompute_pre_mlp_layernorm
        self.is_plain = not recomputes and self.hidden_dropout == 0.0
        self.swap: LayerSwap | None = None

    def forward(self, *args: object, **others: object) -> tuple:
        """As megatron's."""
        if self.swap is None or not (self.training and torch.is_grad_enabled()):
            return self.passed(*args, **others)
        self.swap.begin()
        out = self.passed(*args, **others)
        self.swap.end(out[0])
        return out

    def passed(self, *args: Any, **others: Any) -> tuple:
        """As `forward`, without swapping."""
        padding = getattr(others.get("packed_seq_params"), "padding", None)
        if padding is not None:
            if self.config.sequence_parallel:
                group = self.pg_collection.tp
                padding = padding.chunk(group.size(), dim=1)[group.rank()]
            others["padding_mask"] = padding
        if not self.is_plain:
            return super().forward(*args, **others)
        hidden = args[0] if args else others["hidden_states"]
        return self.computed(hidden, others["packed_seq_params"], padding_mask=padding), others.get("context")

    def computed(self, hidden: torch.Tensor, sequence: TokenSequence, **masks: torch.Tensor | None) -> torch.Tensor:
        """The layer's output [s, b, hidden] (s / TP under sequence parallelism), without dropout.

        Args:
            masks: `padding_mask` for a mixture of experts.
        """
        attended, bias = self.self_attention(self.input_layernorm(hidden), packed_seq_params=sequence)
        if self.config.recompute_granularity is not None:  # with recomputation, backward has twice as many exchanges
            offer_turn()
        if bias is not None:
            attended = attended + bias
        normed, hidden = self.pre_mlp_layernorm(attended, hidden)
        if getattr(self.mlp, "adds_residual", False) and hidden.dtype == normed.dtype:
            return self._mlp(lambda x, residual: self.mlp(x, residual=residual)[0], normed, hidden)
        return hidden + self._mlp(lambda x: self.mlp(x, **masks)[0], normed)

    def _mlp(self, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        return checkpoint(function, False, *inputs) if self.recompute_mlp else function(*inputs)


def add_to_residual(training: bool, fused: bool) -> Callable:
    """megatron's hook for bias, dropout and sum. Its own function rounds the residual to the branch's dtype, which
    undoes --fp32-residual-connection.
    """

    def add(branch: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float) -> torch.Tensor:
        out, bias = branch
        out = out if bias is None else out + bias
        return residual + torch.nn.functional.dropout(out, p=dropout, training=training)

    return add


def weight_gradient(
    weight: torch.Tensor, x: torch.Tensor, grad: torch.Tensor, add_weight_gradient: Callable
) -> torch.Tensor:
    """The gradient that autograd gets for a linear's weight: grad^T x, or an empty tensor if megatron's sum has it.

    Args:
        weight: [out, in], a parameter; x: [rows, in]; grad: [rows, out].
        add_weight_gradient: the kernel; the reference leaves the sum to megatron.
    """
    if not is_summed(weight, add_weight_gradient):
        return (grad.t() @ x).to(weight.dtype)
    add_weight_gradient(x, grad, vars(weight)["main_grad"])
    vars(weight)["grad_added_to_main_grad"] = True
    return torch.empty_like(weight)


def is_summed(weight: torch.Tensor, add_weight_gradient: Callable) -> bool:
    """Whether the kernel adds a weight's gradient to megatron's sum."""
    return hasattr(weight, "main_grad") and add_weight_gradient is not reference.add_weight_gradient


def fuse_weight_gradients(model: torch.nn.Module, kernel: Callable) -> None:
    """Let the linears add their weights' gradients with `kernels.add_weight_gradient`.

    megatron-core's switch is `gradient_accumulation_fusion`; it calls apex's extension by a module-level name.
    """
    # The names differ by the sum's dtype; the kernel accepts both.
    names = ("wgrad_gemm_accum_fp32", "wgrad_gemm_accum_fp16")
    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(**dict.fromkeys(names, kernel))
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.gradient_accumulation_fusion = True


class NoopLayer(MegatronModule, BaseTransformerLayer):
    """A no-op layer: it holds no weights and changes nothing (--noop-layers)."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        *,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, get_pg_rank(pg_collection.pp))

    def forward(self, hidden_states: torch.Tensor, context: object = None, **_: object) -> tuple[torch.Tensor, object]:
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

        Computed in float32, since the loss needs the difference of two rewards, for which bfloat16 is too coarse.
        """
        rewards = torch.nn.functional.linear(hidden.float(), getattr(self, self.name).float()).squeeze(-1)
        if self.sequence_parallel:
            # Every rank has the same rewards in forward, and takes the gradient of its own tokens in backward.
            rewards = gather_from_sequence_parallel_region(rewards, tensor_parallel_output_grad=False, group=self.group)
        return rewards
