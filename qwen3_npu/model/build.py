"""Build the model chunks of this pipeline rank. Training, inference and evaluation all build here."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from qwen3_npu.distributed.layout import Layout
from qwen3_npu.model.arch import Qwen3Arch
from qwen3_npu.model.lora import freeze_base
from qwen3_npu.model.loss import cross_entropy
from qwen3_npu.model.spec import Parts, block_spec


class Qwen3Model(GPTModel):
    """GPTModel with Qwen3's layers and a loss that knows the vocabulary's padding.

    Position embedding is "none" for GPTModel: `model/attention.py` rotates, by the positions of the tokens.
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
        self.arch = arch

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Loss of each token, [b, s] float32, from logits [s, b, local vocabulary]."""
        return cross_entropy(logits, labels.t(), self.pg_collection.tp, self.arch.vocab_size).t()


def build_model(arch: Qwen3Arch, config: TransformerConfig, layout: Layout, parts: Parts) -> list[Qwen3Model]:
    """This rank's model chunks, one without virtual pipeline stages; weights random, with LoRA all but it frozen."""
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
    if parts.lora.on:
        freeze_base(chunks)
    return chunks
