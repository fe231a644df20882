"""The adapter of the embedding."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from qwen3_npu.args.lora import LoraArgs
from qwen3_npu.model.lora.dora import RowLengths
from qwen3_npu.model.lora.start import new_weight
from qwen3_npu.model.modules import Embedding
from qwen3_npu.model.quantized import restored, restored_shape


class LoraEmbedding(torch.nn.Module):
    """The frozen embedding E with its adapter: E[t] + scale B A[:, t]. A [r, vocabulary / TP], B [hidden, r].

    A starts as 0 and B is random, as in peft's adapters of embeddings.
    """

    def __init__(self, base: Embedding, args: LoraArgs, config: TransformerConfig, vocabulary: int) -> None:
        """Args: vocabulary: tokens without padding."""
        super().__init__()
        self.base_layer, self.scale, self.enabled = base, args.scale, True
        rows, hidden = restored_shape(base.weight)
        self.lora_A = torch.nn.ModuleDict(
            {"default": new_weight(base.weight.device, args.lora_r, rows, dim=1, config=config)}
        )
        b = new_weight(base.weight.device, hidden, args.lora_r, dim=None, config=config)
        self.lora_B = torch.nn.ModuleDict({"default": b})
        b.weight.data.normal_()  # outside the tracker: alike on every rank
        self.is_dora = args.use_dora
        if self.is_dora:
            vector = new_weight(base.weight.device, hidden, dim=None, config=config)
            self.lora_magnitude_vector = torch.nn.ModuleDict({"default": vector})
            self.row_lengths = RowLengths(args.scale, base.tp_group)
            self.real = max(min(vocabulary - base.vocab_start_index, rows), 0)

    def lengths(self) -> torch.Tensor:
        """DoRA: the lengths of a linear of one-hot vectors, [hidden] float32: over the vocabulary without padding."""
        weight = restored(self.base_layer.weight)[: self.real].t()
        return self.row_lengths(weight, self.lora_A["default"]()[:, : self.real], self.lora_B["default"]())

    @torch.no_grad()
    def begin(self) -> None:
        """Initialize a new adapter from the base's weights, once they are loaded."""
        if self.is_dora:
            self.lora_magnitude_vector["default"]().copy_(self.lengths())

    @property
    def weight(self) -> torch.nn.Parameter:
        """The base's weight, which GPTModel reads."""
        return self.base_layer.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """As the base layer."""
        out = self.base_layer(tokens)
        if not self.enabled:
            return out
        narrow = self.base_layer.rows(tokens, self.lora_A["default"]().t()) * self.scale
        out = out + torch.nn.functional.linear(narrow, self.lora_B["default"]())
        if self.is_dora:
            out = out * (self.lora_magnitude_vector["default"]() / self.lengths()).to(out.dtype)
        return out
