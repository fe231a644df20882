"""Build the model chunks of this pipeline rank. Training, inference and evaluation use this function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.checkpoint import checkpoint

from qwen3_npu.args.lora import LoraArgs
from qwen3_npu.distributed.layout import Layout
from qwen3_npu.distributed.tensor_parallel.linears import link_linears
from qwen3_npu.kernels import reference
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.model.lora.embedding import LoraEmbedding
from qwen3_npu.model.lora.linear import LoraOutput
from qwen3_npu.model.modules import Embedding, RewardHead, fuse_weight_gradients
from qwen3_npu.model.quantized import Nf4ColumnParallelLinear, hold_codes
from qwen3_npu.model.spec import Parts, block_spec
from qwen3_npu.model.swap import swap_activations


class Qwen3Model(GPTModel):
    """GPTModel with Qwen3's layers and a loss that ignores the vocabulary's padding.

    GPTModel gets position embedding "none": `model/attention.py` applies rotary embedding by the tokens' positions.
    """

    def __init__(
        self,
        arch: Qwen3Arch,
        config: TransformerConfig,
        layout: Layout,
        parts: Parts,
        *,
        chunk: int = 0,
        pre_process: bool = True,
        post_process: bool = True,
    ) -> None:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        super().__init__(
            config,
            block_spec(arch, parts, layout.chunks[stage][chunk]),
            vocab_size=layout.padded_vocab_size,
            max_sequence_length=arch.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=arch.tie_word_embeddings,
            position_embedding_type="none",
            vp_stage=chunk if layout.virtual > 1 else None,
        )
        self.arch, self.loss_chunk, self.cross_entropy = arch, parts.loss_chunk, parts.kernels.cross_entropy
        if arch.reward and post_process:
            del self.output_layer  # GPTModel always makes one
            self.score = RewardHead(config, self.pg_collection.tp, seed=parts.seed, lora=parts.lora.on)
        if pre_process:
            self.embedding.word_embeddings.__class__ = Embedding  # GPTModel makes it itself, without a spec
        self._adapt_ends(parts.lora, config)
        link_linears(self)
        if parts.kernels.add_weight_gradient is not reference.add_weight_gradient:
            fuse_weight_gradients(self, parts.kernels.add_weight_gradient)
            # torch recomputes chunks of the loss with copies of the weights, which lack megatron's attributes.
            if post_process and self.loss_chunk and not arch.reward:
                self.output_layer.gradient_accumulation_fusion = False

    def _adapt_ends(self, lora: LoraArgs, config: TransformerConfig) -> None:
        """Quantize the embedding and output layer that GPTModel has made, and add their adapters."""
        if lora.qlora_embedding and self.pre_process:
            hold_codes(self.embedding.word_embeddings, is_double=lora.qlora_double_quant)
        if lora.qlora_embedding and self.post_process and not self.arch.reward:
            self.output_layer.__class__ = Nf4ColumnParallelLinear
            if self.output_layer.weight is not None:
                hold_codes(self.output_layer, is_double=lora.qlora_double_quant)
        targets, _ = lora.places(self.arch)
        if self.pre_process and "embedding" in targets:
            self.embedding.word_embeddings = LoraEmbedding(
                self.embedding.word_embeddings, lora, config, self.arch.vocab_size
            )
        if self.post_process and "output" in targets:
            self.add_module("output_layer", LoraOutput(self.output_layer, lora))

    def _postprocess(
        self, hidden_states: torch.Tensor, *, labels: torch.Tensor | None, **others: object
    ) -> torch.Tensor:
        """Logits [b, s, local vocabulary]; with labels, losses of tokens [b, s]; of a reward model, rewards [b, s]."""
        if self.post_process and self.arch.reward:
            return self.score(hidden_states).t()
        if self.post_process and labels is not None and self.loss_chunk:
            return self._loss_in_chunks(hidden_states, labels)
        return super()._postprocess(hidden_states=hidden_states, labels=labels, **others)

    def _loss_in_chunks(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The same loss from the logits of a few tokens at a time, which backward recomputes."""
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        output, sequence_parallel = self.output_layer, self.output_layer.sequence_parallel
        if sequence_parallel:
            # Gathered once for all chunks. The backward of that sums and scatters, so the layer itself must do neither.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.pg_collection.tp)

        def loss(hidden: torch.Tensor, labels_sb: torch.Tensor) -> torch.Tensor:
            output.sequence_parallel, output.disable_grad_reduce = False, sequence_parallel
            try:
                logits, _ = output(hidden, weight=tied)
            finally:
                output.sequence_parallel, output.disable_grad_reduce = sequence_parallel, False
            return self.cross_entropy(logits, labels_sb, self.pg_collection.tp, self.arch.vocab_size)

        parts = zip(hidden_states.split(self.loss_chunk), labels.t().split(self.loss_chunk), strict=True)
        return torch.cat([checkpoint(loss, *part, use_reentrant=False) for part in parts]).t()

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Loss of each token, [b, s] float32, from logits [s, b, local vocabulary]."""
        return self.cross_entropy(logits, labels.t(), self.pg_collection.tp, self.arch.vocab_size).t()


def build_model(arch: Qwen3Arch, config: TransformerConfig, layout: Layout, parts: Parts) -> list[Qwen3Model]:
    """This rank's model chunks (one without virtual pipeline stages) with random weights. LoRA freezes all others."""
    stage, last = parallel_state.get_pipeline_model_parallel_rank(), layout.pipeline - 1
    chunks = [
        Qwen3Model(
            arch,
            config,
            layout,
            parts,
            chunk=chunk,
            pre_process=stage == 0 and chunk == 0,
            post_process=stage == last and chunk == layout.virtual - 1,
        )
        for chunk in range(layout.virtual)
    ]
    if parts.swapping is not None:
        swap_activations(chunks, parts.swapping)
    if parts.lora.on:
        freeze(chunks, config, lambda chunk, name: "lora_" not in name or "initial" in name)
    return chunks


def freeze(chunks: Sequence[Qwen3Model], config: TransformerConfig, is_frozen: Callable[[int, str], bool]) -> None:
    """Freeze parameters.

    Call it before gradient buffers and the optimizer are made: frozen weights then get neither, and megatron's linears
    keep no activations for them.

    Args:
        is_frozen: (virtual chunk, parameter name) -> whether it is frozen.
    """
    for number, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(not is_frozen(number, name))
    recomputes = config.recompute_granularity is not None or any(
        getattr(module, name, False) for module in chunks[0].modules() for name in _RECOMPUTED
    )
    first = chunks[0].embedding if recomputes and chunks[0].pre_process else None
    if first is not None and not first.word_embeddings.weight.requires_grad:
        # Recomputation makes gradients only if its input requires one; the output of a frozen embedding does not.
        first.register_forward_hook(lambda module, args, output: output.requires_grad_())


# Attributes of layers, MLPs and experts that turn on their own recomputation in backward.
_RECOMPUTED = ("recompute_mlp", "recompute", "recompute_activation", "recompute_products")
